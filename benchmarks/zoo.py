"""Runs the whole job on a tiny random model of each architecture, and checks what it leaves against plain passes.

    python -m benchmarks.zoo [--quick] [--write] [NAME...]

Every model is written as a folder and searched, repaired, healed and exported with few tokens. Its exported folder is
loaded in another process, by the code beside the weights and without this project; its dense export must give the same
logits; and items that are scored together must get the log-likelihoods of plain passes. Architectures that cannot be
compressed must be refused in one line. `--quick` takes one model of each kind.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Bar, markdown, publish
from benchmarks.zoo_models import KINDS, ZOO, write_model
from compression.refusal import Refusal
from compression.sites import model_parameters
from search.config import Config
from search.evaluation.packed_sequences import Packed
from search.evaluation.workload import loglikelihoods
from search.export.run import ExportForm, export_run
from search.model.loading import load_for_use
from search.pipeline.finish import finish
from search.pipeline.run import run
from search.runtime.console import Console
from search.runtime.errors import DataUnavailable

__all__ = ["Member", "logits_elsewhere", "packed_error", "try_model"]

SIZES: dict[str, Any] = {
    "device": "cpu",
    "agent": "reinforce",
    "budget": 4,
    "target_kept": 0.9,
    "calibration_tokens": 1024,
    "search_items": 2,
    "search_shards": 2,
    "search_text_tokens": 128,
    "heldout_tokens": 512,
    "report_items": 4,
    "repair_tokens": 512,
    "heal_minutes": 0.005,
    "benchmark_items": 0,
    "export": "hf",
}
"""The fields of a run that sees every stage of the job."""
_TOKENS = 48  # length of the text on which logits are compared
_EXACT, _ROUNDED = 1e-3, 0.05  # largest differences of log-likelihoods and of bfloat16 logits


@dataclass
class Member:
    """What came of one model.

    Attributes:
        name: its name in the zoo.
        job: "ok"; or the line of the refusal; or, with "traceback: " before it, the last line of a fault.
        refused_early: whether the job was refused before any work.
        reachable: share of the parameters of the model in matrices that may be compressed.
        sites, dense: numbers of matrices inside blocks, and of those among them that stay dense.
        fresh: largest difference of the exported folder's logits in another process; NaN if there is none.
        merged: likewise of the dense export.
        packed: largest difference of a log-likelihood from that of a plain pass, nats; NaN for a model that continues
            no text, whose texts never share rows.
        folder: the run folder.
    """

    name: str
    job: str = ""
    refused_early: bool = False
    reachable: float = math.nan
    sites: int = 0
    dense: int = 0
    fresh: float = math.nan
    merged: float = math.nan
    packed: float = math.nan
    folder: Path = Path()

    @property
    def faults(self) -> list[str]:
        """Whatever a user must never get: a traceback, a wrong figure, a folder that does not load."""
        found = [self.job] if self.job.startswith("traceback") else []
        if self.job == "ok":
            found += [
                f"{what} differs by {value:.2g}"
                for what, value, most in (
                    ("the folder in another process", self.fresh, _ROUNDED),
                    ("the dense export", self.merged, _ROUNDED),
                    ("packed scoring", self.packed, _EXACT),
                )
                if not (value <= most or (math.isnan(value) and what == "packed scoring"))
            ]
        elif not found and not self.refused_early:
            found = [f"refused after the search began: {self.job}"]
        return found


def try_model(name: str, folder: Path) -> Member:
    """Run the job on a model of the zoo, and compare packed scoring and the dense export; `folder` receives all files.

    The exported folder in another process is left to `logits_elsewhere`.
    """
    member = Member(name, folder=folder / "run")
    source = write_model(name, folder / "model")
    console = Console(quiet=True)
    try:
        config = Config.of({**SIZES, "model": str(source), "out": str(member.folder)})
        summary = run(config, console)
        experiment = summary.experiment
        sites = experiment.sites
        member.sites, member.dense = len(sites), sum(bool(site.dense_because) for site in sites)
        free = sum(site.parameters for site in sites if not site.dense_because)
        member.reachable = free / model_parameters(experiment.loaded.model)
        if not experiment.loaded.kind.is_encoder:
            member.packed = packed_error(experiment.loaded.model)
        finish(member.folder, experiment, console)
        if summary.fault is not None:
            raise summary.fault
        export_run(member.folder, folder / "dense", ExportForm("dense", device="cpu"), console)
        compressed, dense = (load_for_use(str(path), "cpu").model for path in (member.folder / "hf", folder / "dense"))
        dense = dense.to(compressed.dtype)
        member.merged = _difference(_logits(dense), _logits(compressed))
        member.job = "ok"
    except (Refusal, DataUnavailable) as error:
        member.job, member.refused_early = str(error).replace(str(source), name), not member.folder.exists()
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        member.job = f"traceback: {type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})".splitlines()[
            0
        ]
    gc.collect()
    return member


@torch.no_grad()
def packed_error(model: Any) -> float:
    """Largest difference between log-likelihoods of items that are scored together and those of plain passes, nats."""
    tokens = torch.randint(0, 256, (3, 110), generator=torch.Generator().manual_seed(0)).tolist()
    items = [Packed(tuple(row), 90, ((90, 97, 90), (97, 104, 98), (104, 110, 104)), 0) for row in tokens]
    worst = 0.0
    for item, found in zip(items, loglikelihoods(model, items, 400), strict=True):
        for (start, stop, first), value in zip(item.branches, found, strict=True):
            row = [*item.tokens[: item.prefix], *item.tokens[start:stop]]
            logs = model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float().log_softmax(-1)
            scored = range(item.prefix + first - start, len(row))
            wrong = abs(value - sum(float(logs[at - 1, row[at]]) for at in scored))
            worst = max(worst, math.inf if math.isnan(wrong) else wrong)
    return worst


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    ids = torch.arange(_TOKENS)[None]
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
    return logits


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The median over positions of the mean difference, in standard deviations: rounding may change single experts."""
    return float((found - expected).abs().mean(-1).median() / expected.std())


_STRANGER = """
import json, sys, torch, transformers
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
for folder in sys.argv[2:]:
    try:
        classes = json.load(open(f"{folder}/config.json"))["auto_map"]
        load = getattr(transformers, next(name for name in classes if name != "AutoConfig")).from_pretrained
        model = load(folder, trust_remote_code=True, local_files_only=True, dtype="auto").eval()
        assert not any(name.partition(".")[0] in ("search", "compression") for name in sys.modules)
        with torch.no_grad():
            logits = model(input_ids=torch.arange(int(sys.argv[1]))[None], use_cache=False).logits[0].float()
        print(json.dumps([folder, logits.tolist()]), flush=True)
    except Exception as error:
        print(json.dumps([folder, f"{type(error).__name__}: {error}"]), flush=True)
"""


def logits_elsewhere(members: Sequence[Member]) -> None:
    """Load all exported folders in one process that knows nothing of this project, and compare their logits."""
    folders = {str(one.folder / "hf"): one for one in members if one.job == "ok"}
    if not folders:
        return
    with tempfile.TemporaryDirectory() as away:
        command = [sys.executable, "-c", _STRANGER, str(_TOKENS), *folders]
        done = subprocess.run(
            command, cwd=away, env={"HF_HOME": away, "PATH": ""}, capture_output=True, text=True, check=False
        )
    for line in done.stdout.splitlines():
        folder, logits = json.loads(line)
        if not isinstance(logits, str):
            expected = _logits(load_for_use(folder, "cpu").model)
            folders[folder].fresh = _difference(torch.tensor(logits), expected)
        else:
            folders[folder].job = f"traceback: in another process, {logits}"


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models of the zoo; all by default")
    parser.add_argument("--quick", action="store_true", help="one model of each kind")
    parser.add_argument("--write", action="store_true", help="write results/zoo.md")
    arguments = parser.parse_args()
    names = arguments.names or (KINDS if arguments.quick else tuple(ZOO))
    members = []
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            members.append(try_model(name, Path(place) / name))
            print(f"{name}: {members[-1].job}", file=sys.stderr, flush=True)
        logits_elsewhere(members)
    rows = [
        [
            one.name,
            f"{one.sites - one.dense} of {one.sites}" if one.sites else "–",
            _figure(one.reachable, ".0%"),
            one.job,
            *(_figure(value, ".1g") for value in (one.fresh, one.merged, one.packed)),
        ]
        for one in members
    ]
    faults = [f"{one.name}: {fault}" for one in members for fault in one.faults]
    header = ["model", "matrices", "of all parameters", "job", "folder elsewhere", "dense export", "packed scoring"]
    body = f"""{__doc__.split(chr(10) * 2, 2)[2].strip()}

Columns: matrices that may be compressed, of those inside blocks; the share of all parameters that they hold; what came
of the job; the difference of the exported folder's logits in another process and of the dense export, as a share of
the standard deviation of the logits (stored in bfloat16); the largest difference of a log-likelihood, in nats.

{markdown(header, rows)}
"""
    finished = sum(one.job == "ok" for one in members)
    bars = [Bar("faults", len(faults), "<=", 0), Bar("jobs that finish", finished, ">=", 0.8 * len(members))]
    publish("benchmarks.zoo", "Architectures", body, bars, arguments.write)
    print(*faults, sep="\n", file=sys.stderr)


def _figure(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


if __name__ == "__main__":
    main()

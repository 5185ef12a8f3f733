"""Serves a smaller plain model in llama.cpp, and compares size, answers and speed with ours and with the dense model.

    python -m benchmarks.serving [--quick] [--write] [--kept 0.6] [--llama-cpp PYTHON]

The default model is cut to smaller plain matrices by the closed form, without repair or healing, and written as GGUF
files beside the dense model, by the code of `export --format gguf`. llama.cpp runs them with one thread in turns:
dense, small, dense, small, …; speeds are medians over the turns. Its greedy tokens and the log-probabilities of the
first token after each prompt are compared with those of transformers on the same weights.

llama.cpp comes from the package xllamacpp, which stays out of this project's environment. `--llama-cpp` names a Python
that has it. Without one, sizes alone are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.report import Bar, markdown, publish
from benchmarks.tiny_folders import EXPECTED, answers
from compression import ScheduleApplier, lagrangian, to_schedule
from compression.schedule import Form
from compression.sites import model_parameters
from search.config import Config
from search.experiment.experiment import Experiment
from search.export.folder import export_gguf, export_model, export_plain, footprint
from search.export.gguf_file import write_gguf
from search.healing.sharding import sharing_copy
from search.model.loading import LoadedModel

_PROMPTS = (
    "The capital of France is",
    "Water boils at 100 degrees Celsius, and freezes at",
    "Question: What do plants need to grow?\nAnswer:",
    "In 1969, the first people",
    "def add(a, b):\n    return",
    "She opened the door and",
)
_LONG = "The river rises in the hills in the north and flows for two hundred miles to the sea. "
_INSTALL = (
    "llama.cpp was not run: no Python with xllamacpp was found. Install it with `python -m venv ENV` and "
    "`ENV/bin/pip install xllamacpp`, and pass `--llama-cpp ENV/bin/python`."
)
_KINDS = ("float32", "float16", "q8_0")
_ITEM = {"float32": 4.0, "float16": 2.0, "q8_0": 34 / 32}
_ROUNDS, _STEPS, _TOP = 5, 64, 8


@dataclass
class Served:
    """A model in llama.cpp.

    Attributes:
        name: "dense" or "plain".
        model: the same model in transformers.
        file: its GGUF file.
        kind: type of its matrices.
        prefill, decode: tokens a second, for every turn.
        resident: bytes of memory gained by loading.
        version: version of the package.
    """

    name: str
    model: Any
    file: Path
    kind: str
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    resident: int = 0
    version: str = ""

    def ask(self, python: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[dict[str, Any]]:
        """Returns llama.cpp's answers to prompts of token ids, see `benchmarks.llama_cpp`."""
        request = {"model": str(self.file), "prompts": prompts, "tokens": tokens, "top": _TOP, "context": 2048}
        script = Path(__file__).with_name("llama_cpp.py")
        ran = subprocess.run([python, str(script)], input=json.dumps(request), capture_output=True, text=True)
        if ran.returncode:
            raise SystemExit(f"llama.cpp failed on {self.file.name}: {ran.stderr.strip().splitlines()[-1]}")
        said = json.loads(ran.stdout.splitlines()[-1])
        self.version, self.resident = said["version"], said["resident"]
        found: list[dict[str, Any]] = said["answers"]
        return found

    @property
    def stored(self) -> float:
        """Bytes of the parameters in the type of the file."""
        return model_parameters(self.model) * _ITEM[self.kind]


@torch.no_grad()
def differences(model: Any, prompts: Sequence[Sequence[int]], given: Sequence[dict[str, Any]]) -> tuple[float, str]:
    """Compares llama.cpp's answers with transformers on the same weights.

    Returns:
        The largest difference of the log-probabilities of the best candidates for the first token, in nats; and how
        many of the greedy tokens are those that the model gives after the same tokens, as "equal of all".
    """
    worst, equal, count = 0.0, 0, 0
    for prompt, answer in zip(prompts, given, strict=True):
        ids = torch.tensor([[*prompt, *answer["tokens"]]])
        scores = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        worst = max([worst, *(abs(float(scores[0, token]) - said) for token, said in answer["top"][0])])
        found = scores.argmax(-1).tolist()
        equal += sum(ours == theirs for ours, theirs in zip(found, answer["tokens"], strict=True))
        count += len(found)
    return worst, f"{equal} of {count}"


@contextlib.contextmanager
def cut_default(kept: float, form: Form, serve: str = "transformers") -> Iterator[LoadedModel]:
    """The default model cut by the closed form, without repair or healing.

    Args:
        kept: kept fraction over the sites.
        form, serve: as for `search.config.Config`.
    """
    experiment = Experiment.open(Config.of(dict(target_kept=kept, form=form, serve=serve, calibration_tokens=1024)))
    menu = experiment.menu()
    schedule = to_schedule(menu, lagrangian(menu, math.floor(kept * menu.dense_parameters)))
    with ScheduleApplier(experiment.loaded.model, experiment.store, packed=True) as applier:
        applier.apply_(schedule)
        yield experiment.loaded


def default_folders(folder: Path, kept: float = 0.6) -> None:
    """Write the default model for every engine, and what transformers generates, as `write_tiny_folders` does."""
    said = {}
    prompts: list[list[int]] = []
    for name, form, serve in (
        ("hf", "any", "transformers"),
        ("plain", "plain", "vllm"),
        ("gguf", "plain", "llama.cpp"),
    ):
        with cut_default(kept, form, serve) as loaded:
            prompts = [[*loaded.beginning, *loaded.encode(text)] for text in _PROMPTS]
            said[name] = answers(loaded.model, prompts)
            if name == "hf":
                export_model(loaded.model, loaded.tokenizer, folder / name)
            elif name == "plain":
                export_plain(loaded.model, loaded.tokenizer, folder / name)
            else:
                export_gguf(loaded.model, loaded.tokenizer, folder / name, "float32")
    (folder / EXPECTED).write_text(json.dumps({"prompts": prompts, "answers": said}), encoding="utf-8")


def _python(given: str | None) -> str:
    """A Python that has xllamacpp, or an empty text."""
    if given or os.environ.get("XLLAMACPP_PYTHON"):
        return given or os.environ["XLLAMACPP_PYTHON"]
    return sys.executable if importlib.util.find_spec("xllamacpp") else ""


def main() -> None:
    """Measures and prints, and writes the report if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one turn with few tokens, in float16 only")
    parser.add_argument("--write", action="store_true", help="write the tables to results/")
    parser.add_argument("--kept", type=float, default=0.6, help="kept fraction over the sites (default: 0.6)")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="a Python that has xllamacpp")
    given = parser.parse_args()
    python = _python(given.llama_cpp)
    experiment = Experiment.open(Config(target_kept=given.kept, form="plain", calibration_tokens=1024))
    loaded = experiment.loaded
    dense = sharing_copy(loaded.model)
    menu = experiment.store.menu(topology="pivoted-lowrank", fitted={}, form="plain", multiple=None)
    schedule = to_schedule(menu, lagrangian(menu, math.floor(given.kept * menu.dense_parameters)))
    kinds = ("float16",) if given.quick else _KINDS
    prompts = [[*loaded.beginning, *loaded.encode(text)] for text in _PROMPTS]
    long = [[*loaded.beginning, *loaded.encode(_LONG * 40)][: 128 if given.quick else 512]]
    rows: list[list[object]] = []
    bars: list[Bar] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ScheduleApplier(loaded.model, experiment.store, packed=True) as applier,
    ):
        applier.apply_(schedule)
        for kind in kinds:
            sides = []
            for name, model in (("dense", dense), ("plain", loaded.model)):
                side = Served(name, model, Path(folder, f"{name}-{kind}.gguf"), kind)
                write_gguf(model, loaded.tokenizer, side.file, kind)
                sides.append(side)
            agreed = {}
            for side in sides if python else ():
                said = side.ask(python, prompts, 8 if given.quick else 24)
                agreed[side.name] = differences(side.model, prompts, said)
            for _ in range((1 if given.quick else _ROUNDS) if python else 0):
                for side in sides:
                    [answer] = side.ask(python, long, 16 if given.quick else _STEPS)
                    side.prefill.append(answer["prefill"])
                    side.decode.append(answer["decode"])
            rows += [_row(side, sides[0], agreed.get(side.name)) for side in sides]
            bars += _bars(*sides)
    header = ["model", "type", "parameters", "file MB", "file / stored", "resident MB", "prefill tok/s", "of dense"]
    header += ["decode tok/s", "of dense", "first token, nats", "greedy tokens"]
    intro = (
        f"SmolLM2-135M-Instruct, dense and with plain widths at kept fraction {given.kept} by the closed form "
        f"({footprint(loaded.model).float32 / 4e6:,.0f} M parameters dense), neither repaired nor healed. "
        '"file / stored" is the size of the file over that of the parameters in its type. "first token" is the largest '
        "difference of a log-probability from transformers in float32 with the weights before rounding, among the 8 "
        f"best candidates after {len(prompts)} prompts; "
        '"greedy tokens" counts those that are also the best of transformers. Speeds are with one thread, a prompt of '
        f"{len(long[0])} tokens, medians."
    )
    if python:
        intro += f" llama.cpp is that of xllamacpp {sides[0].version}."
    publish(
        "benchmarks.serving",
        "Serving smaller models",
        "\n\n".join([intro, *([] if python else [_INSTALL]), markdown(header, rows)]),
        bars,
        given.write,
    )


def _row(side: Served, dense: Served, agreed: tuple[float, str] | None) -> list[object]:
    speeds: list[object] = ["-"] * 4
    if side.prefill:
        speeds = []
        for name in ("prefill", "decode"):
            mine, others = median(getattr(side, name)), median(getattr(dense, name))
            speeds += [f"{mine:,.1f}", f"{mine / others:.2f}"]
    size = side.file.stat().st_size
    return [
        side.name,
        side.kind,
        f"{model_parameters(side.model) / 1e6:,.1f} M",
        f"{size / 1e6:,.1f}",
        f"{size / side.stored:.3f}",
        f"{side.resident / 1e6:,.0f}" if side.resident else "-",
        *speeds,
        f"{agreed[0]:.4f}" if agreed else "-",
        agreed[1] if agreed else "-",
    ]


def _bars(dense: Served, small: Served) -> list[Bar]:
    bars = [Bar(f"file / stored, {small.kind}", small.file.stat().st_size / small.stored, "<=", 1.05)]
    if small.prefill:
        for name, least in (("prefill", 1.3), ("decode", 1.2)):
            ratio = median(getattr(small, name)) / median(getattr(dense, name))
            bars.append(Bar(f"{name} of dense, {small.kind}", ratio, ">=", least))
    return bars


if __name__ == "__main__":
    main()

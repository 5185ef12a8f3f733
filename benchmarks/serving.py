"""Measures the default model in other engines, dense against smaller; results/serving.md and results/serving-vllm.md.

    python -m benchmarks.serving [--quick] [--write] [--kept 0.618 0.8] [--llama-cpp PYTHON] [--vllm PYTHON]

In llama.cpp: the default model is cut to smaller plain matrices by the closed form, without repair or healing, and
written as GGUF files beside the dense model, by the code of `export --format gguf`. llama.cpp runs them with one thread
in turns: dense, small, dense, small, …; a ratio is the median of the ratios within a turn. Its greedy tokens and the
log-probabilities of the first token after each prompt are compared with those of transformers on the same weights. The
weights in memory are the buffers that llama.cpp says it holds them in, which are the mapped file and what it repacks;
resident memory has the cache of 2,048 tokens and what is computed, too.

llama.cpp comes from the package xllamacpp. `--llama-cpp` names a Python that has it (default: this one). In vLLM, if
`--vllm` names a Python that has it: see `benchmarks.serving_vllm`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import serving_vllm
from benchmarks.default_folders import KEPT, PROMPTS, cut_default
from benchmarks.report import Bar, markdown, publish
from compression.sites import model_parameters
from search.export.gguf_file import write_gguf
from search.model.loading import LoadedModel, load_model

_LONG = "The river rises in the hills in the north and flows for two hundred miles to the sea. "
_KINDS = ("float32", "float16", "q8_0")
_ITEM = {"float32": 4.0, "float16": 2.0, "q8_0": 34 / 32}
_ROUNDS, _STEPS, _TOP = 5, 32, 8
_BARS = {"prefill": 1.3, "decode": 1.2}


@dataclass
class Served:
    """A model in llama.cpp.

    Attributes:
        kept: kept fraction over the sites, 1 if dense.
        parameters: number of parameters.
        file: its GGUF file.
        kind: type of its matrices.
        first, equal: see `differences`.
        weights: bytes of the buffers that llama.cpp holds the weights in.
        resident: bytes of memory gained by loading.
        version: version of the package.
        prefill, decode: tokens a second, for every turn.
    """

    kept: float
    parameters: int
    file: Path
    kind: str
    first: float = 0.0
    equal: str = ""
    weights: float = 0.0
    resident: int = 0
    version: str = ""
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What it is called in the tables."""
        return "dense" if self.kept == 1 else f"plain {self.parameters / 1e6:.0f} M"

    @property
    def stored(self) -> float:
        """Bytes of the parameters in the type of the file."""
        return self.parameters * _ITEM[self.kind]

    def ask(
        self, python: str, prompts: Sequence[Sequence[int]], tokens: int, verbosity: int = 0
    ) -> list[dict[str, Any]]:
        """Returns llama.cpp's answers to prompts of token ids, see `benchmarks.llama_cpp`."""
        request = {"model": str(self.file), "prompts": prompts, "tokens": tokens, "top": _TOP, "context": 2048}
        request["verbosity"] = verbosity
        script = Path(__file__).with_name("llama_cpp.py")
        ran = subprocess.run([python, str(script)], input=json.dumps(request), capture_output=True, text=True)
        if ran.returncode:
            raise SystemExit(f"llama.cpp failed on {self.file.name}: {ran.stderr.strip().splitlines()[-1]}")
        said = json.loads(next(line for line in ran.stdout.splitlines() if line.startswith('{"version"')))
        self.version, self.resident = said["version"], said["resident"]
        if verbosity:
            buffers = re.findall(r"model buffer size = +([\d.]+) MiB", ran.stdout + ran.stderr)
            self.weights = sum(map(float, buffers)) * 2**20
        found: list[dict[str, Any]] = said["answers"]
        return found


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


def main() -> None:
    """Measures and prints, and writes the reports if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one turn with few tokens, and in llama.cpp float16 only")
    parser.add_argument("--write", action="store_true", help="write the tables to results/")
    parser.add_argument(
        "--kept", type=float, nargs="+", default=[KEPT, 0.8], help=f"kept fractions over the sites ({KEPT} 0.8)"
    )
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help=f"number of turns (default: {_ROUNDS})")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="a Python that has xllamacpp (default: this one)")
    parser.add_argument("--vllm", metavar="PYTHON", help="a Python that has vLLM")
    given = parser.parse_args()
    rounds = 1 if given.quick else given.rounds
    if given.vllm:
        serving_vllm.report(given.vllm, given.kept, rounds, given.quick, given.write)
    if given.llama_cpp or (not given.vllm and importlib.util.find_spec("xllamacpp")):
        _report(given.llama_cpp or sys.executable, given.kept, rounds, given.quick, given.write)
    elif not given.vllm:
        raise SystemExit("nothing to measure: pass --llama-cpp or --vllm with a Python that has xllamacpp or vLLM")


def _report(python: str, kepts: Sequence[float], rounds: int, quick: bool, write: bool) -> None:
    kinds = ("float16",) if quick else _KINDS
    with tempfile.TemporaryDirectory() as folder:
        dense = load_model("default", "cpu")
        models = _written(python, dense, 1.0, kinds, Path(folder))
        long = [[*dense.beginning, *dense.encode(_LONG * 40)][: 128 if quick else 512]]
        for kept in kepts:
            with cut_default(kept, "plain", "llama.cpp") as loaded:
                models += _written(python, loaded, kept, kinds, Path(folder))
        models.sort(key=lambda model: kinds.index(model.kind))
        for turn in range(rounds):
            for model in models:
                [answer] = model.ask(python, long, _STEPS)
                model.prefill.append(answer["prefill"])
                model.decode.append(answer["decode"])
            print(f"turn {turn + 1} of {rounds}", flush=True)
        whole = {model.kind: model for model in models if model.kept == 1}
        rows = [_row(model, whole[model.kind]) for model in models]
        bars = [bar for model in models if model.kept < 1 for bar in _bars(model, whole[model.kind])]
    header = ["model", "type", "parameters", "file MB", "file / stored", "weights MB", "weights / stored"]
    header += ["resident MB", "prefill tok/s", "of dense", "decode tok/s", "of dense", "first token, nats"]
    header += ["greedy tokens"]
    intro = (
        f"SmolLM2-135M-Instruct, dense and with plain widths at kept fractions {', '.join(map(str, kepts))} by the "
        'closed form, neither repaired nor healed. "stored" are the bytes of the parameters in the type of the file, '
        'and "weights" the buffers that llama.cpp holds them in; "resident" has the cache of 2,048 tokens and what is '
        'computed, too. "first token" is the largest difference of a log-probability from transformers in float32 with '
        f"the weights before rounding, among the {_TOP} best candidates after {len(PROMPTS)} prompts; "
        '"greedy tokens" counts those that are also the best of transformers. Speeds are with one thread and a prompt '
        f"of {len(long[0])} tokens, medians of {rounds} turns; ratios are medians of the ratios within a turn. "
        f"llama.cpp is that of xllamacpp {models[0].version}."
    )
    publish("benchmarks.serving", "Serving smaller models", f"{intro}\n\n{markdown(header, rows)}", bars, write)


def _written(python: str, loaded: LoadedModel, kept: float, kinds: Sequence[str], folder: Path) -> list[Served]:
    """The GGUF files of a model, each compared with it."""
    prompts = [[*loaded.beginning, *loaded.encode(text)] for text in PROMPTS]
    models = []
    for kind in kinds:
        model = Served(kept, model_parameters(loaded.model), folder / f"{kept}-{kind}.gguf", kind)
        write_gguf(loaded.model, loaded.tokenizer, model.file, kind)
        model.first, model.equal = differences(loaded.model, prompts, model.ask(python, prompts, 24, verbosity=4))
        models.append(model)
    return models


def _ratio(model: Served, dense: Served, name: str) -> float:
    """How many times as fast as dense."""
    return median(mine / other for mine, other in zip(getattr(model, name), getattr(dense, name), strict=True))


def _row(model: Served, dense: Served) -> list[object]:
    size = model.file.stat().st_size
    row: list[object] = [model.name, model.kind, f"{model.parameters / 1e6:,.1f} M"]
    row += [f"{size / 1e6:,.1f}", f"{size / model.stored:.3f}"]
    row += [f"{model.weights / 1e6:,.1f}", f"{model.weights / model.stored:.3f}", f"{model.resident / 1e6:,.0f}"]
    for name in _BARS:
        row += [f"{median(getattr(model, name)):,.1f}", f"{_ratio(model, dense, name):.2f}"]
    return [*row, f"{model.first:.4f}", model.equal]


def _bars(model: Served, dense: Served) -> list[Bar]:
    title = f"{model.name} {model.kind}"
    bars = [Bar(f"file / stored, {title}", model.file.stat().st_size / model.stored, "<=", 1.05)]
    bars.append(Bar(f"weights / stored, {title}", model.weights / model.stored, "<=", 1.05))
    if model.kept == KEPT:
        bars += [Bar(f"{name} of dense, {title}", _ratio(model, dense, name), ">=", _BARS[name]) for name in _BARS]
    return bars


if __name__ == "__main__":
    main()

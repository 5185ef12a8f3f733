"""Measures the default model in vLLM, dense against plain and factored at smaller sizes; part of `benchmarks.serving`.

Every model has a process of its own (`benchmarks.vllm_speed`), and all are loaded before the first is timed. They take
turns: one request of each kind to each model, again and again. A ratio is that of two times of the same turn, so that
what else the machine does meanwhile weighs on both.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import IO

from benchmarks.default_folders import KEPT, cut_default
from benchmarks.report import Bar, markdown, publish
from compression.sites import model_parameters
from search.export.folder import export_dense_, export_model, export_plain
from search.model.loading import LoadedModel, load_model

__all__ = ["report"]

_KINDS = {
    "prefill": {"requests": 2, "prompt": 512, "new": 1},
    "decode 1": {"requests": 1, "prompt": 4, "new": 33},
    "decode 8": {"requests": 8, "prompt": 4, "new": 33},
}
_QUICK = {
    "prefill": {"requests": 2, "prompt": 128, "new": 1},
    "decode 1": {"requests": 1, "prompt": 4, "new": 9},
    "decode 8": {"requests": 8, "prompt": 4, "new": 9},
}
_BARS = {"prefill": 1.25, "decode 1": 1.1, "decode 8": 1.1}


@dataclass
class Model:
    """A folder and what was measured of it.

    Attributes:
        name: "dense", "plain" or "any".
        kept: kept fraction over the sites.
        parameters: number of parameters.
        stored: their bytes in memory.
        file: bytes of the weight files.
        weights: bytes of memory gained by loading the weights in vLLM.
        version: that of vLLM.
        seconds: times of every turn, by the kind of request.
    """

    name: str
    kept: float
    folder: Path
    parameters: int
    stored: int
    file: int
    weights: int = 0
    version: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @contextlib.contextmanager
    def running(self, python: str) -> Iterator[subprocess.Popen[str]]:
        """Loads the model in a process, which ends with the context."""
        command = [python, str(Path(__file__).with_name("vllm_speed.py")), str(self.folder)]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=self.folder
            )
            try:
                said = _answer(process, log)
                self.version, self.weights = str(said["version"]), int(said["weights"])
                yield process
            finally:
                process.kill()
                process.communicate()


def _answer(process: subprocess.Popen[str], log: IO[str] | None = None) -> dict[str, float]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            found: dict[str, float] = json.loads(line)
            return found
    if log is not None:
        log.seek(0)
    raise SystemExit("vLLM failed:\n" + "".join(log.readlines()[-15:] if log else ()))


def _ask(process: subprocess.Popen[str], request: dict[str, int]) -> float:
    assert process.stdin is not None
    print(json.dumps(request), file=process.stdin, flush=True)
    return _answer(process)["seconds"]


def _folders(root: Path, kepts: Sequence[float]) -> Iterator[Model]:
    """Writes and yields the models: dense, then plain and any at each kept fraction."""
    dense = load_model("default", "cpu")
    yield _written(root, "dense", 1.0, dense)
    for kept in kepts:
        with cut_default(kept, "plain", "vllm") as loaded:
            yield _written(root, "plain", kept, loaded)
        with cut_default(kept, "any") as loaded:
            yield _written(root, "any", kept, loaded)


def _written(root: Path, name: str, kept: float, loaded: LoadedModel) -> Model:
    folder = root / f"{name}-{kept}"
    parameters = model_parameters(loaded.model)
    write = {"dense": export_dense_, "plain": export_plain, "any": export_model}[name]
    write(loaded.model, loaded.tokenizer, folder)
    file = sum(each.stat().st_size for each in folder.glob("*.safetensors"))
    return Model(name, kept, folder, parameters, 4 * parameters, file)


def report(python: str, kepts: Sequence[float], rounds: int, quick: bool, write: bool) -> None:
    """Measures and prints, and writes the report to results/ if asked to.

    Args:
        python: that of an environment that has vLLM.
        kepts: kept fractions over the sites.
        rounds: number of turns.
    """
    kinds = _QUICK if quick else _KINDS
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        models = list(_folders(Path(folder), kepts))
        running = [(model, stack.enter_context(model.running(python))) for model in models]
        for _, process in running:  # what runs for the first time takes longer
            for request in kinds.values():
                _ask(process, {**request, "new": 1})
        for turn in range(rounds):
            for kind, request in kinds.items():
                for model, process in running:
                    model.seconds.setdefault(kind, []).append(_ask(process, request))
            print(f"turn {turn + 1} of {rounds}", flush=True)
    dense, bars = models[0], []
    for model in models[1:]:
        title = f"{model.name} at {model.parameters / 1e6:.0f} M"
        bars.append(Bar(f"file / stored, {title}", model.file / model.stored, "<=", 1.05))
        bars.append(Bar(f"weights / stored, {title}", model.weights / model.stored, "<=", 1.05))
        if model.name == "plain" and model.kept == KEPT:
            bars += [Bar(f"{kind} of dense, {title}", _ratio(model, dense, kind), ">=", _BARS[kind]) for kind in kinds]
    header = ["model", "parameters", "file MB", "file / stored", "weights MB", "weights / stored"]
    header += [column for kind in kinds for column in (f"{kind}, tok/s", "of dense")]
    batch = kinds["prefill"]
    intro = (
        "SmolLM2-135M-Instruct in float32, dense, with plain widths and with any form, at kept fractions "
        f"{', '.join(map(str, kepts))} by the closed form, neither repaired nor healed. Served by vLLM {dense.version} "
        "in one process each, with one thread, without torch.compile; the folders with factors by the code beside the "
        f"weights. Prefill is a batch of {batch['requests']} prompts of {batch['prompt']} tokens; decode has 1 and 8 "
        f"sequences. Speeds are medians of {rounds} turns, and ratios are medians of the ratios within a turn. "
        '"weights" is the memory that vLLM\'s process gained by loading the weights, and "stored" the bytes of the '
        "parameters."
    )
    page = f"{intro}\n\n{markdown(header, [_row(model, dense, kinds) for model in models])}"
    publish("benchmarks.serving", "Serving smaller models in vLLM", page, bars, write, "vllm")


def _ratio(model: Model, dense: Model, kind: str) -> float:
    """How many times as fast as dense."""
    return median(other / mine for mine, other in zip(model.seconds[kind], dense.seconds[kind], strict=True))


def _row(model: Model, dense: Model, kinds: dict[str, dict[str, int]]) -> list[object]:
    row: list[object] = [model.name, f"{model.parameters / 1e6:,.1f} M", f"{model.file / 1e6:,.1f}"]
    row += [f"{model.file / model.stored:.3f}", f"{model.weights / 1e6:,.1f}", f"{model.weights / model.stored:.3f}"]
    for kind, request in kinds.items():
        tokens = request["requests"] * (request["prompt"] if kind == "prefill" else request["new"])
        row += [f"{tokens / median(model.seconds[kind]):,.1f}", f"{_ratio(model, dense, kind):.2f}"]
    return row

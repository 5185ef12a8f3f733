"""Measures files of a given size in llama.cpp: what `--serve llama.cpp --size` chooses beside one type everywhere.

    python -m benchmarks.serving_sizes [--quick] [--write] [--sizes 100MB 80MB]

The default model is written as GGUF files in one type for all matrices, by the code of `export --format gguf`, and in
the types that the closed form chooses for every matrix by its bytes, as `search.py --serve llama.cpp --size` does
before it searches; see `benchmarks.quantized_front` for their quality. llama.cpp runs all of them with one thread in
turns; a ratio is the median of the ratios within a turn. The chosen files are compared with transformers on the same
integers, from which llama.cpp differs because it rounds activations to 8 bits where weights are integers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

from benchmarks.default_folders import PROMPTS
from benchmarks.report import Bar, markdown, publish
from benchmarks.serving import Served, differences
from compression import lagrangian, to_schedule
from compression.decomposition.apply import ScheduleApplier
from compression.sites import model_parameters, replaced
from search.config import Config, bytes_of
from search.experiment.experiment import Experiment
from search.experiment.open_model import open_model
from search.export.gguf_file import write_gguf
from search.model.loading import load_model

_LONG = "The river rises in the hills in the north and flows for two hundred miles to the sea. "
_KINDS = ("float16", "q8_0", "q5_0", "q4_0")
_STEPS = 32


def chosen(size: str, file: Path, python: str) -> Served:
    """Writes the default model in so many bytes, and compares what llama.cpp computes with transformers."""
    config = Config.of({"serve": "llama.cpp", "size": size, "dtype": "float32", "device": "cpu"})
    loaded, sites = open_model(config, torch.device("cpu"))
    experiment = Experiment.of(config, loaded, sites, torch.device("cpu"))
    menu = experiment.menu()
    schedule = to_schedule(menu, lagrangian(menu, int(experiment.budget.target_kept * menu.dense_parameters)))
    ends = experiment.stored_ends()
    served = Served(0.0, model_parameters(loaded.model), file, "float16")
    prompts = [[*loaded.beginning, *loaded.encode(text)] for text in PROMPTS]
    with ScheduleApplier(loaded.model, experiment.store, packed=True) as applier:
        applier.apply_(schedule)
        with replaced(loaded.model, ends):
            write_gguf(loaded.model, loaded.tokenizer, file, "float16")
            served.first, served.equal = differences(loaded.model, prompts, served.ask(python, prompts, 24, 4))
    return served


def main() -> None:
    """Measures and prints, and writes the report if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one turn with few tokens")
    parser.add_argument("--write", action="store_true", help="write the table to results/")
    parser.add_argument("--sizes", nargs="+", default=["100MB", "80MB"], help="sizes of the chosen files")
    parser.add_argument("--rounds", type=int, default=5, help="number of turns (default: 5)")
    given = parser.parse_args()
    rounds, python = 1 if given.quick else given.rounds, sys.executable
    with tempfile.TemporaryDirectory() as folder:
        dense = load_model("default", "cpu")
        prompts = [[*dense.beginning, *dense.encode(text)] for text in PROMPTS]
        models: dict[str, Served] = {}
        for kind in _KINDS:
            model = Served(1.0, model_parameters(dense.model), Path(folder) / f"{kind}.gguf", kind)
            write_gguf(dense.model, dense.tokenizer, model.file, kind)
            model.first, model.equal = differences(dense.model, prompts, model.ask(python, prompts, 24, 4))
            models[f"{kind} everywhere"] = model
        for size in given.sizes:
            models[f"chosen for {size}"] = chosen(size, Path(folder) / f"{size}.gguf", python)
        long = [[*dense.beginning, *dense.encode(_LONG * 40)][: 128 if given.quick else 512]]
        for turn in range(rounds):
            for model in models.values():
                [answer] = model.ask(python, long, _STEPS)
                model.prefill.append(answer["prefill"])
                model.decode.append(answer["decode"])
            print(f"turn {turn + 1} of {rounds}", flush=True)
        first = models["float16 everywhere"]
        rows, bars = [], []
        for name, model in models.items():
            cells: list[object] = [name, f"{model.file.stat().st_size / 1e6:,.1f}", f"{model.weights / 1e6:,.1f}"]
            for speed in ("prefill", "decode"):
                mine, others = getattr(model, speed), getattr(first, speed)
                ratio = median(one / other for one, other in zip(mine, others, strict=True))
                cells += [f"{median(mine):,.1f}", f"{ratio:.2f}"]
            rows.append([*cells, f"{model.first:.4f}", model.equal])
        for size in given.sizes:
            model = models[f"chosen for {size}"]
            bars.append(Bar(f"weights in llama.cpp over {size}", model.weights / bytes_of(size), "<=", 1.01))
    header = ["model", "file MB", "weights MB", "prefill tok/s", "of float16", "decode tok/s", "of float16"]
    header += ["first token, nats", "greedy tokens"]
    intro = (
        'SmolLM2-135M-Instruct in GGUF files, neither searched, repaired nor healed. "weights" are the buffers that '
        'llama.cpp holds them in. "first token" is the largest difference of a log-probability from transformers in '
        "float32, with the weights before rounding for one type everywhere and with the same integers for the chosen "
        f'ones, after {len(PROMPTS)} prompts; "greedy tokens" counts those that are also the best of transformers. '
        f"Speeds are with one thread and a prompt of {len(long[0])} tokens, medians of {rounds} turns; ratios are "
        f"medians of the ratios within a turn. llama.cpp is that of xllamacpp {first.version}."
    )
    publish(
        "benchmarks.serving_sizes", "Files of a given size", f"{intro}\n\n{markdown(header, rows)}", bars, given.write
    )


if __name__ == "__main__":
    main()

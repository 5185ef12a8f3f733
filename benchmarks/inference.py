"""Compares tokens per second, time to the first token and memory of a dense model and compressed ones.

    python -m benchmarks.inference [--quick] [--write] [--folder DIR ...] [--kept 0.618] [--form plain]

Without folders, the compressed model is `pivoted-lowrank` with one kept fraction at every site and random weights,
since time does not depend on them; 0.618 over the sites of the default model leaves 94 million parameters. `--form`
cuts the default model by the closed form instead, with bonds between matrices (`any`) or those alone (`plain`).
`--folder` measures exported folders of the same model, which may be quantized. To measure time, the models take turns
in one process. To measure memory, each model runs alone in its own process, which loads it as a user would; the peak is
that of prefill and decoding. Runs on the CPU, and on a GPU too if there is one, unless `--device` names one of them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.default_folders import cut_default
from benchmarks.memory import peak_resident, resident
from benchmarks.report import Bar, markdown, publish
from compression.layers.planner import Planner, random_layer
from compression.layers.skeleton import describe
from compression.numerics.legs import resolve
from compression.sites import discover_sites, put_modules
from search.evaluation.latency import Modules, decode, layer_costs, prefill
from search.export.folder import export_model, footprint
from search.model.loading import load_for_use, load_model

BARS = {None: (1.25, 1.0), "plain": (1.35, 1.2), "any": (1.25, 1.1)}
"""Least speed of prefill and decode over the dense model, by form."""
_LOADED = "loaded"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements: batch sizes, prompt length in tokens, rounds per batch size, and decoding steps."""

    batches: tuple[int, ...] = (1, 8)
    prompt: int = 512
    rounds: tuple[int, ...] = (27, 9)
    steps: int = 48


QUICK = Sizes(prompt=256, rounds=(3, 3), steps=12)


def main() -> None:
    """Measures and prints, and writes the report if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="use shorter prompts and fewer rounds")
    parser.add_argument("--write", action="store_true", help="write the tables to results/")
    parser.add_argument("--model", default="default", help="dense model, as for search.py")
    parser.add_argument("--kept", type=float, default=0.618, help="kept fraction without --folder (default: 0.618)")
    parser.add_argument("--form", choices=("plain", "any"), help="cut the default model by the closed form")
    parser.add_argument("--folder", action="append", default=[], type=Path, help="exported folder; may be repeated")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype on the CPU (default: its fastest)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="device (default: all available)")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.form and (given.folder or given.model != "default"):
        parser.error("--form cuts the default model; leave --model and --folder out")
    sizes = QUICK if given.quick else Sizes()
    bf16 = torch.cpu._is_avx512_bf16_supported()
    dtype = getattr(torch, given.dtype) if given.dtype else torch.bfloat16 if bf16 else torch.float32
    if given.peak:
        print(*_peak(given.peak, sizes, dtype))
        return
    there = ["cpu", *(["cuda:0"] if torch.cuda.is_available() else [])]
    devices = [torch.device(name) for name in there if name.startswith(given.device or "")]
    parts, bars = [], []
    for device in devices:
        body, more = _report(given, sizes, device, dtype if device.type == "cpu" else torch.bfloat16)
        parts.append(body)
        bars += more
    variant = "-".join(filter(None, (given.form, given.dtype)))
    publish("benchmarks.inference", "Inference", "\n\n".join(parts), bars, given.write, variant)


def _report(given: argparse.Namespace, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> tuple[str, list[Bar]]:
    with tempfile.TemporaryDirectory() as scratch:
        loaded = load_model(given.model, device, dtype)
        folders = {folder.name: folder for folder in given.folder}
        if not folders:
            name = f"{given.form or 'kept'} {given.kept}"
            folders[name] = Path(scratch) / "compressed"
            if given.form:
                with cut_default(given.kept, given.form) as cut:
                    export_model(cut.model.to(dtype), cut.tokenizer, folders[name])
            else:
                _export_random(given.model, given.kept, dtype, folders[name])
        dense, sides = _sides(loaded.model, folders, dtype)
        rows, bars = _timed(loaded.model, dense, sides, sizes, device, BARS[given.form])
        memory = _memory(given, folders) if device.type == "cpu" else ""
    title = f"### {device.type}, {str(dtype).removeprefix('torch.')}, prompts of {sizes.prompt}"
    heading = ("side", "batch", "prefill tok/s", "of dense", "first token ms", "decode tok/s", "of dense")
    return "\n\n".join(part for part in (title, markdown(heading, rows), memory) if part), bars


def _export_random(model: str, kept: float, dtype: torch.dtype, folder: Path) -> None:
    loaded = load_model(model, "cpu", dtype)
    for site in discover_sites(loaded.model):
        if site.dense_because:
            continue
        legs = resolve("pivoted-lowrank", site.out_features, site.in_features)
        layer = random_layer(legs, legs.largest_chi(int(kept * site.parameters)), dtype, torch.device("cpu"))
        loaded.model.set_submodule(site.name, layer)
    export_model(loaded.model, loaded.tokenizer, folder)


def _sides(model: nn.Module, folders: Mapping[str, Path], dtype: torch.dtype) -> tuple[Modules, dict[str, Modules]]:
    """Returns the dense modules that some side replaces, and the modules of every folder under both plans."""
    sides: dict[str, Modules] = {}
    device = next(model.parameters()).device
    for name, folder in folders.items():
        for optimize in ("memory", "latency"):
            other = load_for_use(str(folder), device).model.to(dtype)
            Planner(optimize, layer_costs(), measure=optimize == "latency").plan_(other)
            sides[f"{name}, {optimize}"] = {each: other.get_submodule(each) for each in describe(other)}
    names = {name for side in sides.values() for name in side}
    dense = {name: model.get_submodule(name) for name in names}
    return dense, {name: {**dense, **side} for name, side in sides.items()}


@torch.inference_mode()
def _timed(
    model: Any,
    dense: Modules,
    others: Mapping[str, Modules],
    sizes: Sizes,
    device: torch.device,
    least: tuple[float, float],
) -> tuple[list[list[object]], list[Bar]]:
    sides = {"dense": dense, **others}
    rows: list[list[object]] = []
    bars = []
    first: dict[str, list[float]] = {}
    for batch, rounds in zip(sizes.batches, sizes.rounds, strict=True):
        filled = prefill(model, sides, sizes.prompt, rounds, device, batch)
        first = first or filled
        stepped = decode(model, sides, sizes.steps, device, batch)
        for side in sides:
            fill, step = (_ratio(times["dense"], times[side]) for times in (filled, stepped))
            rows.append(
                [
                    side,
                    batch,
                    f"{batch * sizes.prompt / median(filled[side]):,.0f}",
                    f"{fill:.2f}",
                    f"{1e3 * median(first[side]):,.1f}",
                    f"{batch / median(stepped[side]):,.1f}",
                    f"{step:.2f}",
                ]
            )
            if side != "dense" and device.type == "cpu":
                label = f"{side.replace(', ', '-').replace(' ', '-')}-batch-{batch}"
                bars += [Bar(f"prefill-{label}", fill, ">=", least[0]), Bar(f"decode-{label}", step, ">=", least[1])]
    put_modules(model, dense)
    return rows, bars


def _ratio(dense: Sequence[float], mine: Sequence[float]) -> float:
    """Speed relative to dense, median over rounds; above 1 is faster."""
    return median(other / own for other, own in zip(dense, mine, strict=True))


def _memory(given: argparse.Namespace, folders: Mapping[str, Path]) -> str:
    rows = []
    for name, source in {"dense": given.model, **folders}.items():
        command = [sys.executable, "-m", "benchmarks.inference", "--peak", str(source)]
        command += ["--quick"] if given.quick else []
        command += ["--dtype", given.dtype] if given.dtype else []
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        stored, idle, peak = (int(word) / 1e6 for word in ran.stdout.split()[-3:])
        rows.append([name, f"{stored:,.1f}", f"{idle:,.0f}", f"{peak:,.0f}"])
    return markdown(("side, memory in MB", "weights", "process, loaded", "process, peak"), rows)


@torch.inference_mode()
def _peak(name: str, sizes: Sizes, dtype: torch.dtype) -> tuple[int, int, int]:
    """Returns the bytes of the weights, of this process after loading, and its peak during prefill and decoding."""
    model = load_for_use(name, "cpu").model.to(dtype)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # makes the kernel reset the peak
    idle = resident()
    for batch in sizes.batches:
        prefill(model, {_LOADED: {}}, sizes.prompt, 1, torch.device("cpu"), batch)
        decode(model, {_LOADED: {}}, 2, torch.device("cpu"), batch)
    return footprint(model).stored, idle, peak_resident()


if __name__ == "__main__":
    main()

"""Measures held-out KL over bytes for int4 alone, χ alone, and all forms chosen together by bytes.

    python -m benchmarks.quantized_front [--quick] [--engines] [--write]

The sizes are those of int4 alone with the embedding in 16, 8 and 4 bits. "int4 alone" rounds every matrix to 4 bits:
in the metric of its inputs, which is what GPTQ does, and in that of its inputs and output gradients, as `export
--quantize int4` does. At each size "χ alone" spends the same bytes on factors of 16 bits by the closed form, and
"small" on all that `search.py --size` has, by the closed form too, with the embedding in the bits that `--size` gives
it (see `search.model.budget`); at the smallest size it is also repaired. A last point of "small" has 93 % fewer bytes
than the dense model in float32.

"q4_0" and "q5_0" are what llama.cpp's own quantization gives: every matrix rounded to the nearest, the embedding in
q8_0. "mlx 4 bits" is what `mlx_lm.convert -q` gives: every matrix and the embedding in 4 bits, in groups of 64 with a
scale and a bias. "for llama.cpp", "for mlx-lm" and "for vllm" have the bytes of these and of "int4 alone" with an
embedding of 16 bits, and what `search.py --serve ENGINE --size` has, by the closed form.

Nothing is searched or healed. Bytes count all tensors. The default model was published in 4 bits with 32
numbers per group, so int4 loses less on it than on a model published in 16 bits. Everything is computed in float32: in
bfloat16 any change of the weights costs 0.002 nats. `--quick` measures little text.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import torch
from torch import nn

from benchmarks.report import RESULTS, Bar, markdown, publish
from compression import lagrangian, to_schedule
from compression.decomposition.apply import ScheduleApplier
from compression.decomposition.repair import repair_
from compression.layers.quantize import Moments, quantized
from compression.numerics.packed_size import FLOATING, GROUP
from compression.numerics.whitening import shrink
from compression.sites import put_modules, replaced
from search.config import BYTES, Config
from search.evaluation.quality import Quality
from search.evaluation.workload import Workload
from search.experiment.calibration import factor_store
from search.experiment.experiment import Experiment
from search.experiment.open_model import open_model
from search.export.folder import footprint
from search.model.budget import Budget
from search.model.devices import resolve_device
from search.model.ends import rounded_ends

_HEADLINE = 0.93
_ENDS = (16, 8, 4)
_LESS = 0.75
"""Goal of the KL of "small" over that of int4 in the metric of inputs, at the sizes below 100 MB."""


@dataclass(frozen=True)
class Point:
    """One model of the front."""

    way: str
    ends: int
    bytes: int
    quality: Quality


@dataclass(eq=False)
class Front:
    """Makes and measures the points of the front from the dense model of an experiment."""

    experiment: Experiment
    points: list[Point] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = self.experiment.loaded.model
        self.sites = [site for site in self.experiment.sites if not site.dense_because]
        self.workload = Workload(self.experiment.shards("heldout")[0], self.model)
        self.workload.reference(self.model)
        self.read = self.experiment.head_moment()
        self.float32 = footprint(self.model).float32

    def ends(self, bits: int, group: int = GROUP) -> Mapping[str, nn.Module]:
        """Embedding and head in so many bits, by name."""
        return {} if bits == FLOATING else rounded_ends(self.model, bits, self.read, group)

    def measure(self, way: str, ends_bits: int, size: int | None = None) -> Point:
        """Measures the model as it is, prints the point and adds it to the front; `size` if not that of its tensors."""
        tensors = {values.data_ptr(): values for values in self.model.state_dict().values()}
        found = sum(
            values.numel() * (BYTES if values.is_floating_point() else values.element_size())
            for values in tensors.values()
        )
        point = Point(way, ends_bits, size or found, self.workload.measure(self.model))
        self.points.append(point)
        print(f"{way}, embedding {ends_bits}: {point.bytes / 1e6:.1f} MB, KL {point.quality.kl:.4f}", flush=True)
        return point

    def rounded(self, way: str, bits: int, ends_bits: int, both: bool) -> Point:
        """Measures the model with every matrix in so many bits, in the metric of C and G or of C alone."""
        statistics, shrinkage = self.experiment.calibration(), self.experiment.calibration.shrinkage

        def moments(name: str) -> Moments:
            gradients = shrink(statistics.gradient(name), shrinkage) if both else None
            return shrink(statistics.input(name), shrinkage), gradients

        made = dict(quantized(self.model, {site.name: bits for site in self.sites}, moments))
        with replaced(self.model, {**made, **self.ends(ends_bits)}):
            return self.measure(way, ends_bits)

    def nearest(
        self, kind: str, ends_bits: int, rounded: Callable[[np.ndarray, bool], tuple[np.ndarray, int]]
    ) -> Point:
        """Measures the model with all matrices and the embedding as an engine's own tool rounds them.

        Args:
            rounded: of a matrix, and whether it is inside the blocks, returns the rounded one and its bytes.
        """
        taken: dict[torch.nn.Parameter, torch.Tensor] = {}
        size = 0
        for name, values in self.model.named_parameters():
            if values.ndim < 2:
                size += BYTES * values.numel()
                continue
            inside = any(name == f"{site.name}.weight" for site in self.sites)
            made, count = rounded(values.detach().numpy(), inside)
            size += count
            taken[values] = values.detach().clone()
            values.data.copy_(torch.from_numpy(made))
        try:
            return self.measure(kind, ends_bits, size)
        finally:
            for values, before in taken.items():
                values.data.copy_(before)

    def allocated(
        self,
        way: str,
        form: Literal["factors", "small"],
        size: int,
        serve: str = "transformers",
        repaired: bool = False,
    ) -> Point:
        """Measures the closed form over what a form offers, with `size` bytes for the whole model; also repaired."""
        asked = {"form": form, "size": f"{size}B", "serve": serve, "export": "none"}
        if form == "factors":
            asked = {"form": "factors", "target_bytes_kept": size / (self.float32 // 4 * BYTES)}
        config = Config.of({"model": self.experiment.config.model, **asked})
        budget = Budget.of(config, self.model, self.experiment.sites)
        store, experiment = self.experiment.store, self.experiment
        if serve != "transformers":
            calibration = experiment.calibration
            store = factor_store(experiment.loaded, experiment.sites, calibration, calibration.cache, budget.forms)
        menu = store.menu(form=form, price=budget.price, factored=config.has_factors)
        schedule = to_schedule(menu, lagrangian(menu, int(budget.target_kept * menu.dense_parameters)))
        ends = self.ends(budget.embedding_bits, config.scale_group)
        if repaired:
            batches, order = experiment.repair_batches(config.repair_tokens), store.bonds.elimination
            how = experiment.calibration(), batches, config.shrinkage, order
            taken = repair_(self.model, store.sites, schedule, *how, entries=store.entries.entries)
            try:
                with replaced(self.model, ends):
                    return self.measure(way, budget.embedding_bits)
            finally:
                put_modules(self.model, taken)
        stored = None if serve == "transformers" else budget.sizes.bytes(schedule)  # MLX adds a bias to every scale
        with ScheduleApplier(self.model, store, packed=True) as applier:
            applier.apply_(schedule)
            with replaced(self.model, ends):
                return self.measure(way, budget.embedding_bits, stored)


def main() -> None:
    """Measures and prints, and writes the report and the plot if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="measure little text")
    parser.add_argument("--write", action="store_true", help="write the table and the plot to results/")
    parser.add_argument("--engines", action="store_true", help="only what engines take, and their own tools")
    parser.add_argument("--model", default="default", help="model, as for search.py")
    given = parser.parse_args()
    sizes = {"heldout_tokens": 1024, "report_items": 8} if given.quick else {}
    # So small a share that the store offers pruned matrices as well; the budgets of the points are their own.
    config = Config.of({"model": given.model, "form": "small", "target_kept": 0.1, "dtype": "float32", **sizes})
    device = resolve_device("auto")
    loaded, sites = open_model(config, device)
    front = Front(Experiment.of(config, loaded, sites, device))
    bars = _engines(front) if given.engines else _measure(front)
    body, chart = _table(front), given.write and not given.engines
    if chart:
        body += "\n\n![front](quantized_front.svg)"
        _plot(front.points, RESULTS / "quantized_front.svg")
    publish("benchmarks.quantized_front", "Quality over bytes", body, bars, given.write, "engines" * given.engines)


def _gguf(kind: str, values: np.ndarray, inside: bool) -> tuple[np.ndarray, int]:
    number = gguf.GGMLQuantizationType[kind.upper() if inside else "Q8_0"]
    stored = gguf.quants.quantize(values, number)
    return gguf.quants.dequantize(stored, number), stored.nbytes


def _mlx(bits: int, values: np.ndarray, inside: bool) -> tuple[np.ndarray, int]:
    import mlx.core as mx

    stored = mx.quantize(mx.array(values).astype(mx.float16), group_size=GROUP, bits=bits)
    back = mx.dequantize(*(each if n == 0 else each.astype(mx.float32) for n, each in enumerate(stored)), GROUP, bits)
    return np.array(back), sum(each.nbytes for each in stored)


def _measure(front: Front) -> list[Bar]:
    bars = []
    front.rounded("int8 alone", 8, 8, both=True)
    for number, ends_bits in enumerate(_ENDS):
        rival = front.rounded("int4 alone, C", 4, ends_bits, both=False)
        front.rounded("int4 alone, C and G", 4, ends_bits, both=True)
        mixed = front.allocated("small", "small", rival.bytes)
        goal = 1.0 if ends_bits == FLOATING else _LESS
        bars.append(Bar(f"kl-over-int4-at-size-{number + 1}", mixed.quality.kl / rival.quality.kl, "<=", goal))
        if ends_bits == min(_ENDS):
            better = front.allocated("small, repaired", "small", rival.bytes, repaired=True)
            bars.append(Bar("repaired-over-int4-at-the-smallest", better.quality.kl / rival.quality.kl, "<=", _LESS))
        try:
            chi = front.allocated("χ alone", "factors", rival.bytes)
        except ValueError as error:
            print(f"χ alone cannot reach {rival.bytes} bytes: {error}")
            continue
        bars.append(Bar(f"kl-over-chi-at-size-{number + 1}", mixed.quality.kl / chi.quality.kl, "<=", 1.0))
    bars += _engines(front)
    smallest = front.allocated("small", "small", int((1 - _HEADLINE) * front.float32))
    bars.append(Bar("bytes-saved-of-float32", 1 - smallest.bytes / front.float32, ">=", _HEADLINE))
    return bars


def _engines(front: Front) -> list[Bar]:
    """Measures what engines' own tools give, and what the closed form has for these engines at the same bytes."""
    bars = []
    known = {(each.way, each.ends): each for each in front.points}
    name = "int4 alone, C"
    rivals = [("vllm", known.get((name, FLOATING)) or front.rounded(name, 4, FLOATING, both=False))]
    rivals += [("llama.cpp", front.nearest(kind, 8, partial(_gguf, kind))) for kind in ("q4_0", "q5_0")]
    if importlib.util.find_spec("mlx"):
        rivals += [("mlx-lm", front.nearest(f"mlx {bits} bits", bits, partial(_mlx, bits))) for bits in (4, 6)]
    for engine, rival in rivals:
        mixed = front.allocated(f"for {engine}", "small", rival.bytes, engine)
        bars.append(Bar(f"kl-over-{rival.way}-in-{engine}", mixed.quality.kl / rival.quality.kl, "<=", 1.0))
    return bars


def _table(front: Front) -> str:
    rows = [
        [
            point.way,
            point.ends,
            f"{point.bytes / 1e6:.1f}",
            f"{1 - point.bytes / front.float32:.1%}",
            f"{1 - 2 * point.bytes / front.float32:.1%}",
            f"{point.quality.kl:.4f}",
            f"{point.quality.perplexity:.2f}",
            f"{point.quality.agreement:.3f}",
            f"{point.quality.accuracy:.3f}",
            f"{point.quality.expected_accuracy:.3f}",
        ]
        for point in sorted(front.points, key=lambda point: -point.bytes)
    ]
    heading = ("way", "embedding bits", "MB", "less than fp32", "less than fp16", "KL nats/token", "perplexity")
    return markdown((*heading, "agreement", "accuracy", "P(correct)"), rows)


def _plot(points: Sequence[Point], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for way in dict.fromkeys(point.way for point in points):
        mine = sorted((point.bytes / 1e6, point.quality.kl) for point in points if point.way == way)
        axes.plot(*zip(*mine, strict=True), marker="o", label=way)
    axes.set(xlabel="MB of all tensors", ylabel="held-out KL, nats per token", yscale="log")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()

"""Measures held-out KL over bytes for int4 alone, χ alone, and both chosen together by bytes.

    python -m benchmarks.quantized_front [--quick] [--write]

The three sizes are those of int4 alone with the embedding in 16, 8 and 4 bits. At each size, "χ alone" keeps 16 bits
and spends the same bytes by the closed form. "both" chooses for every site between dense and χ in 16, 8 and 4 bits by
predicted cost (see `compression.allocation.byte_menu`), with the embedding in 8, 8 and 4 bits. A fourth point of "both"
has 93 % fewer bytes than the dense model in float32.

The KL of the model differs from the sum of the costs predicted for single sites, by one ratio for rounding and another
for truncation. Both ratios are measured once on search text, and predictions of rounding are multiplied by their
quotient. There is no search, repair or healing. Bytes count all tensors. The default model was published in 4 bits with
32 numbers per group, so int4 loses less on it than on a model published in 16 bits.

`--quick` rounds to nearest and measures little text; otherwise rounding errors are fed back in the metric.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from compression.allocation.byte_menu import PLAIN, ByteMenu, Noise, byte_menu

from benchmarks.report import RESULTS, Bar, markdown, publish
from compression import DENSE, Choice, Menu, MPOLinear, Schedule, dense_weight, lagrangian
from compression.decomposition.apply import ScheduleApplier
from compression.layers.quantize import GROUP, packed, quantize_
from compression.numerics.gauge import stored
from compression.numerics.whitening import Whitening, shrink
from compression.sites import Site, put_modules
from search.config import Config
from search.evaluation.quality import Quality
from search.evaluation.workload import Workload
from search.experiment.experiment import Experiment
from search.experiment.open_model import open_model
from search.export.folder import footprint
from search.model.devices import resolve_device
from search.model.ends import ends, reads_head_input

_HEADLINE = 0.93
_ENDS = (16, 8, 4)
_PROBE = 0.5  # kept fraction at which the rounding error of low rank is measured
_TRUNCATED = 0.9  # kept fraction at which the KL of truncation is measured


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
    feedback: bool
    points: list[Point] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = self.experiment.loaded.model
        self.sites = [site for site in self.experiment.sites if not site.dense_because]
        self.workload = Workload(self.experiment.shards("heldout")[0], self.model)
        self.workload.reference(self.model)
        self.statistics = self.experiment.calibration()
        self.read = self.experiment.head_moment() if self.feedback else None
        self.float32 = footprint(self.model).float32

    def spectrum(self, site: Site) -> np.ndarray:
        """Singular values of the whitened matrix of a site."""
        return self.experiment.store.factors(site.name, "lowrank", "two-sided").spectrum.double().numpy()

    def moment(self, name: str) -> torch.Tensor | None:
        """Input moment of a site or head in whose metric rounding errors are fed back; None rounds to nearest."""
        if name in ends(self.model):
            return self.read if reads_head_input(self.model, name) else None
        known = self.feedback and any(site.name == name for site in self.sites)
        return shrink(self.statistics.input(name), self.experiment.calibration.shrinkage) if known else None

    def noise(self, site: Site) -> dict[int, Noise]:
        """Measures the costs of rounding one site as `changed` rounds it, by number of bits."""
        dense = self.model.get_submodule(site.name)
        weight = dense_weight(dense)
        moments = self.statistics.input(site.name), self.statistics.gradient(site.name)
        whitening = Whitening.of(*moments, self.experiment.calibration.shrinkage)
        legs_chi = max(1, int(_PROBE * site.parameters / (site.out_features + site.in_features)))
        cores = self.experiment.store.cores(site.name, Choice("pivoted-lowrank", legs_chi, "two-sided"))

        def cost(matrix: torch.Tensor) -> float:
            return 0.5 * float(whitening.apply(matrix.float()).square().sum())

        found, moment = {}, self.moment(site.name)
        for bits in (8, 4):
            rounded = packed(dense, bits, GROUP, moment).weight
            layer = MPOLinear(stored(cores, True))
            whole = layer.weight
            share = cost(packed(layer, bits, GROUP, moment).weight - whole) / max(cost(whole), 1e-30)
            found[bits] = Noise(cost(rounded - weight), share)
        return found

    @contextmanager
    def changed(self, choices: Mapping[str, Choice], bits: Mapping[str, int], ends_bits: int) -> Iterator[None]:
        """Compresses and rounds the sites, embedding and head within the context; restores the dense model after it."""
        names = [*(site.name for site in self.sites), *ends(self.model)]
        taken = {name: self.model.get_submodule(name) for name in names}
        applier = ScheduleApplier(self.model, self.experiment.store, packed=True)
        try:
            everywhere = {site.name: DENSE for site in self.experiment.sites} | dict(choices)
            applier.apply_(Schedule(tuple(everywhere.items())))
            wanted = {name: each for name, each in bits.items() if each != PLAIN}
            if ends_bits != PLAIN:
                wanted |= dict.fromkeys(ends(self.model), ends_bits)
            quantize_(self.model, wanted, self.moment)
            yield
        finally:
            put_modules(self.model, taken)

    def measure(self, way: str, choices: Mapping[str, Choice], bits: Mapping[str, int], ends_bits: int) -> Point:
        """Measures a point, prints it and adds it to the front."""
        with self.changed(choices, bits, ends_bits):
            point = Point(way, ends_bits, self.bytes(), self.workload.measure(self.model))
        self.points.append(point)
        print(f"{way}, embedding {ends_bits}: {point.bytes / 1e6:.1f} MB, KL {point.quality.kl:.4f}", flush=True)
        return point

    def bytes(self) -> int:
        """Bytes of the model's current tensors; floating-point numbers that are not packed count two bytes each."""
        tensors = {values.data_ptr(): values for values in self.model.state_dict().values()}
        return sum(
            values.numel() * (2 if values.is_floating_point() else values.element_size()) for values in tensors.values()
        )

    def rate(self, noises: Mapping[str, Mapping[int, Noise]]) -> float:
        """Ratio of the KL per predicted nat of rounding to 4 bits to that of truncation, measured on search text."""
        workload = Workload([one for shard in self.experiment.shards("search") for one in shard], self.model)
        workload.reference(self.model)
        menus = [byte_menu(site, self.spectrum(site), {}, GROUP) for site in self.sites]
        room = int(_TRUNCATED * sum(2 * site.parameters for site in self.sites))
        choices, _, truncated = _closed_form(menus, room)
        rounded = sum(noise[4].dense for noise in noises.values())
        ratios = []
        for predicted, chosen, bits in ((rounded, {}, dict.fromkeys(noises, 4)), (truncated, choices, {})):
            with self.changed(chosen, bits, PLAIN):
                ratios.append(workload.measure(self.model).kl / predicted)
        print(f"KL on search text over predicted: {ratios[0]:.3f} rounded, {ratios[1]:.3f} truncated", flush=True)
        return ratios[0] / ratios[1]

    def allocated(self, way: str, menus: Sequence[ByteMenu], budget: int, ends_bits: int) -> Point:
        """Measures the closed form over the menus with `budget` bytes for the whole model."""
        with self.changed({}, {}, ends_bits):
            fixed = self.bytes() - sum(2 * site.parameters for site in self.sites)
        choices, bits, _ = _closed_form(menus, budget - fixed)
        return self.measure(way, choices, bits, ends_bits)


def _closed_form(menus: Sequence[ByteMenu], room: int) -> tuple[dict[str, Choice], dict[str, int], float]:
    """Returns the closed form's choices and bits by site for `room` bytes, and their total predicted cost."""
    picked = list(zip(menus, lagrangian(Menu(tuple(each.menu for each in menus)), room), strict=True))
    choices = {each.menu.site.name: each.menu.choices[i] for each, i in picked}
    bits = {each.menu.site.name: each.bits[i] for each, i in picked}
    return choices, bits, sum(float(each.menu.cost[i]) for each, i in picked)


def main() -> None:
    """Measures and prints, and writes the report and the plot if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="round to nearest and measure little text")
    parser.add_argument("--write", action="store_true", help="write the table and the plot to results/")
    parser.add_argument("--model", default="default", help="model, as for search.py")
    given = parser.parse_args()
    sizes = {"heldout_tokens": 1024, "report_items": 8} if given.quick else {}
    config = Config.of({"model": given.model, **sizes})
    device = resolve_device("auto")
    loaded, sites = open_model(config, device)
    front = Front(Experiment.of(config, loaded, sites, device), feedback=not given.quick)
    bars = _measure(front)
    body = _table(front) + ("\n\n![front](quantized_front.svg)" if given.write else "")
    if given.write:
        _plot(front.points, RESULTS / "quantized_front.svg")
    publish("benchmarks.quantized_front", "Quality over bytes", body, bars, given.write)


def _measure(front: Front) -> list[Bar]:
    noises = {site.name: front.noise(site) for site in front.sites}
    rate = front.rate(noises)
    noises = {
        name: {bits: Noise(rate * one.dense, rate * one.share) for bits, one in of.items()}
        for name, of in noises.items()
    }
    menu: Callable[[Site, Mapping[int, Noise]], ByteMenu] = lambda site, noise: byte_menu(  # noqa: E731
        site, front.spectrum(site), noise, GROUP
    )
    both = [menu(site, noises[site.name]) for site in front.sites]
    alone = [menu(site, {}) for site in front.sites]
    everything = {site.name: 4 for site in front.sites}
    bars = []
    front.measure("int8 alone", {}, dict.fromkeys(everything, 8), 8)
    for number, ends_bits in enumerate(_ENDS):
        rounded = front.measure("int4 alone", {}, everything, ends_bits)
        mixed = front.allocated("both", both, rounded.bytes, min(ends_bits, 8))
        rivals = {"int4": rounded}
        try:
            rivals["chi"] = front.allocated("χ alone", alone, rounded.bytes, 16)
        except ValueError as error:
            print(f"χ alone cannot reach {rounded.bytes} bytes: {error}")
        for name, rival in rivals.items():
            bars.append(Bar(f"kl-over-{name}-at-size-{number + 1}", mixed.quality.kl / rival.quality.kl, "<=", 1.0))
    smallest = front.allocated("both", both, int((1 - _HEADLINE) * front.float32), 4)
    bars.append(Bar("bytes-saved-of-float32", 1 - smallest.bytes / front.float32, ">=", _HEADLINE))
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

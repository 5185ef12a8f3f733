"""Draws the figures of docs/concepts.md and the README from the files published in results/.

    python -m benchmarks.figures [--out docs/figures]

No model is needed: bond dimensions come from the published prior of the default job, and sensitivity traces, which a
matrix with a cut bond has none of, from that of a job with factors only.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.report import RESULTS
from search.priors.format import Prior

DEFAULT = RESULTS / "priors" / "smollm2-135m-instruct-113m.json"
_FACTORS = RESULTS / "priors" / "smollm2-135m-instruct-113m-factors.json"
FOLDER = RESULTS.parent / "docs" / "figures"
_SHOWN = (("q", 15), ("v", 15), ("gate", 2), ("gate", 27), ("down", 2), ("down", 27))
_BLUE, _GREY, _RED = "#3b6ea8", "#555555", "#b3452c"


def mpo(figure: Any) -> None:
    """Draws a matrix, its MPO with three cores, and its `lowrank` MPO."""
    axes = figure.subplots(1, 3, width_ratios=(1, 2.4, 1.7))
    pictures = (
        ("W", [("", "out", "in")], []),
        ("mpo3", [("A¹", "o₁", "i₁"), ("A²", "o₂", "i₂"), ("A³", "o₃", "i₃")], ["χ₁", "χ₂"]),
        ("lowrank", [("A¹", "out", ""), ("A²", "", "in")], ["χ"]),
    )
    for axis, (title, cores, bonds) in zip(axes, pictures, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlim(-0.6, len(cores) - 0.4)
        axis.set_ylim(-1.15, 1.15)
        axis.axis("off")
        for place, (name, above, below) in enumerate(cores):
            for leg, side in ((above, 1), (below, -1)):
                if leg:
                    axis.plot([place, place], [0, 0.75 * side], color=_GREY, lw=1.5, zorder=1)
                    axis.text(place, 0.95 * side, leg, ha="center", va="center", fontsize=9)
            axis.scatter([place], [0], s=620, color=_BLUE, zorder=2)
            axis.text(place, 0, name, ha="center", va="center", color="white", fontsize=9, zorder=3)
        for place, bond in enumerate(bonds):
            axis.plot([place, place + 1], [0, 0], color=_BLUE, lw=3, zorder=1)
            axis.text(place + 0.5, 0.18, bond, ha="center", fontsize=9)


def block(figure: Any) -> None:
    """Draws the matrices of an attention and of an MLP, with the bonds between them."""
    axes = figure.subplots(1, 2)
    pictures = (
        ("attention", ("q", "k", "v"), "o", "heads", "key/value groups,\nwith their queries"),
        ("MLP", ("gate", "up"), "down", "hidden", "hidden units"),
    )
    for axis, (title, writers, reader, bond, unit) in zip(axes, pictures, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlim(-1.1, 3.1)
        axis.set_ylim(-1.5, 1.5)
        axis.axis("off")
        heights = np.linspace(1, -1, len(writers))
        for name, height in zip(writers, heights, strict=True):
            axis.plot([-1, 0], [height, height], color=_GREY, lw=1.5, zorder=1)
            axis.plot([0, 1], [height, 0], color=_RED, lw=4, zorder=1)
            axis.scatter([0], [height], s=700, color=_BLUE, zorder=2)
            axis.text(0, height, name, ha="center", va="center", color="white", fontsize=9, zorder=3)
        axis.plot([1, 2], [0, 0], color=_RED, lw=4, zorder=1)
        axis.plot([2, 3], [0, 0], color=_GREY, lw=1.5, zorder=1)
        axis.scatter([1], [0], s=260, color="white", edgecolors=_RED, linewidths=2, zorder=2)
        axis.scatter([2], [0], s=700, color=_BLUE, zorder=2)
        axis.text(2, 0, reader, ha="center", va="center", color="white", fontsize=9, zorder=3)
        axis.text(1.5, 0.25, bond, ha="center", color=_RED, fontsize=9)
        axis.text(1.3, -0.75, f"width: number of\n{unit}", ha="left", va="center", fontsize=8)
        axis.text(-1, 1.35, "stream", ha="left", fontsize=8)
        axis.text(3, 0.25, "stream", ha="right", fontsize=8)


def chi(figure: Any) -> None:
    """Draws the kept fraction of every matrix in the published schedule."""
    prior = Prior.read(DEFAULT)
    blocks = sorted({site.block for site in prior.sites})
    families = list(dict.fromkeys(site.family for site in prior.sites))
    table = np.full((len(families), len(blocks)), np.nan)
    for site in prior.sites:
        kept = site.parameters / (site.shape[0] * site.shape[1])
        table[families.index(site.family), blocks.index(site.block)] = kept
    axes = figure.subplots()
    image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_yticks(range(len(families)), families)
    axes.set_xticks(range(0, len(blocks), 5))
    axes.set_xlabel("block")
    figure.colorbar(image, label="kept fraction, 1 is dense")


def metric(figure: Any) -> None:
    """Draws the predicted KL over χ for some matrices, each compressed alone."""
    prior = Prior.read(_FACTORS)
    axes = figure.subplots()
    for family, block in _SHOWN:
        site = next(site for site in prior.sites if (site.family, site.block) == (family, block))
        trace = site.sensitivity
        axes.plot([each / min(site.shape) for each in trace.chi], trace.kl, label=f"{family}, block {block}")
    axes.set_yscale("log")
    axes.set_xlabel("χ, as a fraction of the full one")
    axes.set_ylabel("predicted KL, nats per token")
    axes.legend(fontsize=8)


FIGURES: Mapping[str, tuple[Callable[[Any], None], tuple[float, float]]] = {
    "mpo": (mpo, (6.4, 1.9)),
    "block": (block, (6.4, 2.6)),
    "chi": (chi, (6.4, 2.3)),
    "metric": (metric, (5.2, 3.0)),
}


def drawn(name: str) -> str:
    """Returns one figure as SVG text."""
    from matplotlib.figure import Figure

    draw, size = FIGURES[name]
    figure, out = Figure(figsize=size, layout="constrained"), io.StringIO()
    draw(figure)
    with matplotlib.rc_context({"svg.hashsalt": "chisel", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None}, facecolor="white")
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=FOLDER)
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib.use("svg")
    for name in FIGURES:
        (folder / f"{name}.svg").write_text(drawn(name), encoding="utf-8")


if __name__ == "__main__":
    main()

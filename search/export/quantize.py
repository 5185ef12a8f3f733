"""Decides how many bits each module of a model gets under `--quantize`, and quantizes the model.

int8, int4   quantize everything that is stored as a matrix: cores, dense sites, embeddings and head
mixed        keeps cores, pruned and rounded matrices as they are and stores the rest in int4, as CompactifAI does
             (arXiv:2401.14109)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from compression.layers.filled_linear import FilledLinear
from compression.layers.mpo_linear import MPOLinear
from compression.layers.packed import PackedMatrix
from compression.layers.quantize import Moments, quantize_
from compression.layers.sparse_linear import SparseLinear
from compression.numerics.whitening import shrink
from compression.sites import Site
from compression.training.scales import packed_ends
from search.experiment.experiment import Experiment
from search.model.ends import ends, reads_head_input

__all__ = ["QUANTIZE", "module_bits", "quantize_experiment_", "rounded"]

QUANTIZE = ("none", "int8", "int4", "mixed")


def module_bits(model: Any, sites: tuple[Site, ...], kind: str) -> dict[str, int]:
    """Return bits by module name, for `compression.layers.quantize.quantize_`. Unchanged modules are not listed."""
    modules = {site.name: model.get_submodule(site.name) for site in sites if not site.dense_because}
    names = [
        name
        for name, module in modules.items()
        if (kind != "mixed" or not isinstance(module, MPOLinear | FilledLinear))
        and any(each.numel() for each in module.parameters())
    ]
    return dict.fromkeys([*names, *ends(model)], 8 if kind == "int8" else 4)


def rounded(model: nn.Module) -> str:
    """Returns a sentence about the quantized matrices of a model, for its model card; empty if it has none."""
    matrices = [module for module in model.modules() if isinstance(module, PackedMatrix)]
    if not matrices:
        return ""
    outside = {id(matrix) for matrix in packed_ends(model)}
    mixed = any(isinstance(module, MPOLinear | SparseLinear) for module in model.modules())
    if all(id(matrix) in outside for matrix in matrices):
        what = "The embedding and the head are"
    else:
        what = "Embeddings, head and dense matrices are" if mixed else "Everything is"
    bits = sorted({matrix.bits for matrix in matrices}, reverse=True)
    return f"{what} stored in {' and '.join(map(str, bits))} bits, in groups with one scale each."


def quantize_experiment_(
    experiment: Experiment, bits: dict[str, int], progress: Callable[[int], None] = lambda done: None
) -> None:
    """Quantize the model of an experiment in place, in the metric of its calibration statistics.

    A head, or a matrix that head and embedding share, is rounded in the metric of what the head reads on calibration
    text, which for the default model in 4 bits costs a third of what rounding to nearest does.

    Args:
        bits: bits by module name, see `module_bits`.
        progress: called with the number of modules done so far.
    """
    statistics, model = experiment.calibration(), experiment.loaded.model
    read = [name for name in ends(model) if name in bits and reads_head_input(model, name)]
    seen = experiment.head_moment() if read else None
    known = {site.name for site in experiment.sites if not site.dense_because}

    def moments(name: str) -> Moments:
        if name in read:
            return None if seen is None else (seen, None)
        if name not in known:
            return None
        shrinkage = experiment.calibration.shrinkage
        return shrink(statistics.input(name), shrinkage), shrink(statistics.gradient(name), shrinkage)

    quantize_(model, bits, moments, progress=progress)

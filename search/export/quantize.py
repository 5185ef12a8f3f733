"""Decides how many bits each module of a model gets under `--quantize`, and quantizes the model.

int8, int4   quantize everything that is stored as a matrix: cores, dense sites, embeddings and head
mixed        keeps cores and pruned matrices as they are and stores the rest in int4, as CompactifAI does
             (arXiv:2401.14109)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from compression.layers.mpo_linear import MPOLinear
from compression.layers.packed import PackedMatrix
from compression.layers.quantize import quantize_
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
        if (kind != "mixed" or not isinstance(module, MPOLinear | SparseLinear))
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
    bits = max(matrix.bits for matrix in matrices)
    return f"{what} stored in {bits} bits, in groups with one scale each."


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

    def moment(name: str) -> torch.Tensor | None:
        if name in read:
            return seen
        return shrink(statistics.input(name), experiment.calibration.shrinkage) if name in known else None

    quantize_(model, bits, moment, progress=progress)

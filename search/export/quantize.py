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
from compression.layers.quantize import quantize_
from compression.layers.sparse_linear import SparseLinear
from compression.numerics.whitening import shrink
from compression.sites import Site
from search.experiment.experiment import Experiment

__all__ = ["QUANTIZE", "ends", "module_bits", "quantize_experiment_"]

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


def ends(model: Any) -> list[str]:
    """Return the names of the token embedding and the output head."""
    wanted = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [
        name
        for name, module in model.named_modules()
        if any(module is each for each in wanted) and isinstance(module, nn.Embedding | nn.Linear)
    ]


def quantize_experiment_(
    experiment: Experiment, bits: dict[str, int], progress: Callable[[int], None] = lambda done: None
) -> None:
    """Quantize the model of an experiment in place, in the metric of its calibration statistics.

    Args:
        bits: bits by module name, see `module_bits`.
        progress: called with the number of modules done so far.
    """
    statistics = experiment.calibration()
    known = {site.name for site in experiment.sites if not site.dense_because}

    def moment(name: str) -> torch.Tensor | None:
        return shrink(statistics.input(name), experiment.calibration.shrinkage) if name in known else None

    quantize_(experiment.loaded.model, bits, moment, progress=progress)

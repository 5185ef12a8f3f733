"""Applying a schedule to a live model, by difference, and taking it back bit for bit.

Knows the module tree and the factor store. Only sites whose choice differs from the last applied one are touched; the
original modules are kept as they are and put back, never copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import torch
from torch import nn

from compression.decomposition.factors import FactorStore
from compression.layers.mpo_linear import MPOLinear
from compression.layers.planner import Planner
from compression.numerics.gauge import stored
from compression.refusal import Refusal
from compression.schedule import DENSE, Choice, Schedule

__all__ = ["ScheduleApplier"]


class ScheduleApplier:
    """Holds a model and swaps its sites. Use as a context manager to be sure the dense model is restored.

    Args:
        model: the dense model; changed in place by `apply_`.
        store: factors of its sites.
        packed: hold what a schedule stores, in tensors of its own: pivoted topologies pivoted, and no other number.
            Otherwise layers are plain cores, views into the decomposition: the same matrices, quick to swap.
        planner: gives every new layer its plan; by default layers keep nothing beside their cores.
    """

    def __init__(
        self, model: nn.Module, store: FactorStore, packed: bool = False, planner: Planner | None = None
    ) -> None:
        self._model = model
        self._store = store
        self._packed = packed
        self._planner = planner
        self._dense: Mapping[str, nn.Module] = {
            site.name: model.get_submodule(site.name) for site in store.sites if not site.dense_because
        }
        self._current: dict[str, Choice] = dict.fromkeys((site.name for site in store.sites), DENSE)

    def apply_(self, schedule: Schedule) -> list[str]:
        """Make the model follow `schedule`; returns the names of the sites that changed.

        Raises:
            ValueError: the schedule names an unknown site, leaves one out, or asks for a χ that no decomposition has or
                for one at a site that stays dense; the model is then unchanged.
        """
        wanted = dict(schedule.choices)
        if wanted.keys() != self._current.keys():
            odd = sorted(wanted.keys() ^ self._current.keys())
            raise Refusal(f"a schedule must name every site of the model and no other, check {odd[0]!r}")
        changed = [name for name, choice in wanted.items() if choice != self._current[name]]
        modules = {name: self.module(name, wanted[name]) for name in changed}
        for name, module in modules.items():
            self._model.set_submodule(name, module)
            self._current[name] = wanted[name]
        return changed

    def restore_(self) -> None:
        """Put every original module back."""
        self.apply_(Schedule.dense(tuple(self._current)))

    def __enter__(self) -> ScheduleApplier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore_()

    def module(self, name: str, choice: Choice) -> nn.Module:
        """What stands in the place of a site under a choice: the original, or a new layer."""
        if choice.is_dense:
            return self._dense[name]
        cores = self._store.cores(name, choice)
        dense = self._dense[name]
        weight = dense.weight
        assert isinstance(weight, torch.Tensor)
        cores = [core.to(device=weight.device, dtype=weight.dtype) for core in cores]
        bias = dense.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        layer = MPOLinear(stored(cores, choice.topology.startswith("pivoted-")) if self._packed else cores, bias)
        if self._planner is not None:
            layer.plan = self._planner.plan(layer)
        return layer

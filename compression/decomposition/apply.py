"""Applies schedules to a model in memory and restores the dense model bit for bit.

Knows the module tree and the factor store; does not know how factors are made. Replaces only the sites whose choice
differs from the schedule applied before. The original modules are kept, not copied, and are put back unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import TracebackType

import torch
from torch import nn

from compression.bonds import keep_, linear_layer
from compression.decomposition.factors import FactorStore
from compression.layers.mpo_linear import MPOLinear
from compression.layers.planner import Planner
from compression.numerics.gauge import stored
from compression.refusal import Refusal
from compression.schedule import DENSE, Choice, Schedule
from compression.sites import Site, Unit, check_widths, dense_weight

__all__ = ["ScheduleApplier"]


class ScheduleApplier:
    """Replaces the sites of a model by the layers of a schedule.

    Use it as a context manager to make sure that the dense model is restored.

    Args:
        model: the dense model; `apply_` changes it in place.
        store: provides the factors of the sites.
        packed: whether layers hold exactly what the schedule stores, in tensors of their own, with pivoted topologies
            in pivoted form, pruned matrices without their zeros, and rounded ones as integers. Otherwise layers hold
            plain cores that are views into the decomposition, and whole matrices; these represent the same matrices
            and are quicker to swap.
        planner: sets the plan of every new layer; with None layers keep nothing in memory besides their cores.
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
        """Change the model to `schedule`; returns the names of the sites that changed.

        Raises:
            ValueError: the schedule names an unknown site, omits a site, asks for a χ above the largest that saves
                parameters, compresses a site that must stay dense, or cuts a bond to different widths at two of its
                sites. Sites that were to change may then be dense; the others are unchanged.
        """
        wanted = dict(schedule.choices)
        if wanted.keys() != self._current.keys():
            odd = sorted(wanted.keys() ^ self._current.keys())
            raise Refusal(f"a schedule must name every site of the model and no other, check {odd[0]!r}")
        check_widths(self._store.sites, {name: choice.widths for name, choice in wanted.items()})
        changed = [name for name, choice in wanted.items() if choice != self._current[name]]
        for name in changed:  # frees what their layers hold before the new ones take as much
            if self._current[name] != DENSE:
                self._put(name, self._dense[name], DENSE)
        modules = {}
        for done, name in enumerate(changed):
            self._store.progress(done, len(changed))
            modules[name] = self.module(name, wanted[name])
        for name, module in modules.items():
            self._put(name, module, wanted[name])
        return changed

    def _put(self, name: str, module: nn.Module, choice: Choice) -> None:
        self._model.set_submodule(name, module)
        self._current[name] = choice

    def restore_(self) -> None:
        """Restore the dense model by putting back every original module."""
        self.apply_(Schedule.dense(tuple(self._current)))

    def __enter__(self) -> ScheduleApplier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore_()

    def replacement(self, unit: Site | Unit, schedule: Schedule) -> nn.Module:
        """Returns what would stand in the place of a site, or of the module around a unit, under another schedule.

        The model does not change. Of a module around a unit, everything but the sites is shared.
        """
        if isinstance(unit, Site):
            return self.module(unit.name, schedule[unit.name])
        around = self._model.get_submodule(unit.name)
        other = copy.copy(around)
        vars(other).update({key: copy.copy(value) for key, value in vars(around).items() if isinstance(value, dict)})
        for site in unit.sites:
            other.set_submodule(site.name.removeprefix(f"{unit.name}."), self.module(site.name, schedule[site.name]))
        return other

    def module(self, name: str, choice: Choice) -> nn.Module:
        """Returns the module of a site under a choice: the original module, or a new layer."""
        if choice.is_dense:
            return self._dense[name]
        if choice.keeps_entries:
            entries = self._store.entries.entries(name, choice)  # refuses a site that must stay dense
            weight, bias = _parameters(self._dense[name])
            return entries.layer(weight.dtype, bias, self._packed)
        # Refuses a site that must stay dense, which may be no layer with a weight.
        made = [self._store.bonds.plain(name, choice.widths)] if choice.is_plain else self._store.cores(name, choice)
        dense = self._dense[name]
        weight, bias = _parameters(dense)
        rows, columns = self._store.bonds.kept(name, choice.widths)
        if bias is not None and rows is not None:
            bias = bias[rows.to(bias.device)]
        cores = [values.to(device=weight.device, dtype=weight.dtype) for values in made]
        layer: nn.Module
        if choice.is_plain:
            layer = linear_layer(cores[0], bias)
        else:
            layer = MPOLinear(stored(cores, choice.topology.startswith("pivoted-")) if self._packed else cores, bias)
            if self._planner is not None:
                layer.plan = self._planner.plan(layer)
        places = (each if each is None else each.to(weight.device) for each in (rows, columns))
        return keep_(layer, tuple(dense_weight(dense).shape), *places)


def _parameters(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, torch.Tensor)
    assert bias is None or isinstance(bias, torch.Tensor)
    return weight, bias

"""Finds the coordinates that the heads of an attention may be written in, by tests on the model itself.

Knows the module tree of a torch model; does not know transformers, schedules or statistics. The values of a head may be
written in any basis if turning them in v, and turning them back in o, leaves the output of the attention as it was. In
the same way, q and k are turned together: by any orthogonal matrix, which is allowed without rotary positions, or
inside pairs of rows, which is all that rotary positions allow. The pairs of the two usual layouts are tried. Dropping
half of the directions must then have the same effect in q, in k and in both, which fails if q or k is normalised. A
test counts only if the same change to one side alone moves the output, so a model that ignores its scores is undecided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compression.bonds import Bond, first_calls, hidden_states, linear_layer, tolerance
from compression.numerics.attention_bonds import rotary_pairs
from compression.refusal import Refusal
from compression.sites import dense_weight, put_modules

__all__ = ["Coordinates", "head_coordinates"]

_MOVED = 4  # a change counts as seen if the output moves by more than this many times the tolerance
_STRONGER = (1.0, 8.0, 64.0, 512.0)  # q is multiplied by the first of these that makes changes of the scores seen


@dataclass(frozen=True)
class Coordinates:
    """Tells how the heads of one attention may be written without changing what it computes.

    Attributes:
        values: whether v and o may be written in any basis, one for each key/value group.
        scores: the same for q and k: "any" basis; or pairs of rows that are rotated together and may be removed
            together, "half" for (i, i + d / 2) and "interleaved" for (2i, 2i + 1); or "" if none of these holds or the
            test cannot decide.
    """

    values: bool
    scores: str


def head_coordinates(model: nn.Module, bond: Bond) -> Coordinates:
    """Returns how the heads of an attention may be written.

    Args:
        model: the dense model in evaluation mode, as for `compression.bonds.discover_bonds`.
        bond: its bond of kind "heads", whose writers are q, k and v in this order.

    Raises:
        ValueError: the bond is of another kind.
    """
    if bond.kind != "heads":
        raise Refusal(f"{bond.name} has no heads, its bond is of the kind {bond.kind!r}")
    calls = first_calls(model, [bond.name])
    if bond.name not in calls:
        return Coordinates(False, "")
    return _Trial(model, bond, *calls[bond.name]).coordinates()


class _Trial:
    """Runs one attention with some of its matrices multiplied, and compares outputs."""

    def __init__(self, model: nn.Module, bond: Bond, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._model, self._bond, self._args, self._kwargs = model, bond, args, kwargs
        self._generator = torch.Generator().manual_seed(0)
        self._query, self._key, self._value = bond.writers

    def coordinates(self) -> Coordinates:
        bond = self._bond
        size = bond.rows[2]
        turns = self._turns(size, None)
        back = {self._value: turns, bond.reader: turns}
        values = self._same({}, back) and self._moved({}, {self._value: turns})
        if bond.rows[0] % bond.rows[1]:
            return Coordinates(values, "")
        for stronger in _STRONGER:
            scale = {self._query: stronger * torch.eye(bond.rows[1]).repeat(bond.groups, 1, 1)}
            turns = self._turns(bond.rows[1], None)
            if self._moved(scale, {self._query: stronger * turns}):
                return Coordinates(values, self._scores(stronger))
        return Coordinates(values, "")

    def _scores(self, stronger: float) -> str:
        """Returns the layout of q and k, see `Coordinates`, with q multiplied by a factor."""
        size, groups = self._bond.rows[1], self._bond.groups
        plain = {self._query: stronger * torch.eye(size).repeat(groups, 1, 1)}
        layouts: dict[str, torch.Tensor | None] = {"any": None}
        if not size % 2:
            layouts |= {"half": rotary_pairs(size), "interleaved": rotary_pairs(size, interleaved=True)}
        found = []
        for name, pairs in layouts.items():
            turns = self._turns(size, pairs)
            if pairs is None:
                kept = turns[:, : size // 2]
                drop = kept.mT @ kept
            else:
                places = pairs[torch.randperm(len(pairs), generator=self._generator)[: len(pairs) // 2]].flatten()
                drop = torch.zeros(size).index_fill(0, places, 1.0).diag().repeat(groups, 1, 1)
            query, key = {self._query: stronger * drop}, {self._key: drop}
            turned = {self._query: stronger * turns, self._key: turns}
            if (
                self._same(plain, turned)
                and self._moved(plain, query)
                and self._same(query, plain | key)
                and self._same(query, query | key)
            ):
                found.append(name)
        return found[0] if found[:1] == ["any"] or len(found) == 1 else ""

    def _turns(self, size: int, pairs: torch.Tensor | None) -> torch.Tensor:
        """Returns a random orthogonal matrix for every group (groups, size, size), one that only mixes `pairs`."""
        groups = self._bond.groups
        if pairs is None:
            random: torch.Tensor = torch.linalg.qr(torch.randn(groups, size, size, generator=self._generator)).Q
            return random
        angles = 1 + torch.rand(groups, len(pairs), generator=self._generator)
        turns = torch.zeros(groups, size, size)
        first, second = pairs.unbind(1)
        turns[:, first, first] = turns[:, second, second] = angles.cos()
        turns[:, first, second], turns[:, second, first] = -angles.sin(), angles.sin()
        return turns

    def _same(self, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> bool:
        """Whether two sets of multiplied matrices give the same output up to rounding."""
        difference = self._difference(before, after)
        return difference is not None and difference <= 1

    def _moved(self, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> bool:
        """Whether two sets of multiplied matrices give outputs that differ by clearly more than rounding."""
        difference = self._difference(before, after)
        return difference is not None and difference > _MOVED

    def _difference(self, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> float | None:
        """Returns the largest difference of two outputs as a multiple of the tolerance; None if there is none."""
        first, second = self._run(before), self._run(after)
        if first is None or second is None or first.shape != second.shape:
            return None
        scale = tolerance(first.dtype) * max(float(first.float().abs().max()), 1e-30)
        return float((first - second).float().abs().max()) / scale

    @torch.no_grad()
    def _run(self, factors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Returns the output of the attention after the heads of some sites are multiplied, by group."""
        taken = {name: self._model.get_submodule(name) for name in factors}
        try:
            put_modules(self._model, {name: self._multiplied(name, taken[name], of) for name, of in factors.items()})
            return hidden_states(self._model.get_submodule(self._bond.name)(*self._args, **self._kwargs))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, ArithmeticError):
            return None
        finally:
            put_modules(self._model, taken)

    def _multiplied(self, name: str, module: nn.Module, factors: torch.Tensor) -> nn.Linear:
        """Returns a matrix whose heads are multiplied: its rows if it writes the bond, its columns if it reads it."""
        weight, bias = dense_weight(module), module.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        values = weight.shape[1] if name == self._bond.reader else weight.shape[0]
        heads = values // (self._bond.groups * factors.shape[-1])
        blocks: torch.Tensor = torch.block_diag(*factors.repeat_interleave(heads, dim=0))  # type: ignore[no-untyped-call]
        blocks = blocks.to(weight.device)
        if name == self._bond.reader:
            return linear_layer((weight.float() @ blocks.mT).to(weight.dtype), bias)
        turned = None if bias is None else (blocks @ bias.float()).to(bias.dtype)
        return linear_layer((blocks @ weight.float()).to(weight.dtype), turned)

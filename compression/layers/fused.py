"""Splits fused matrices into their parts: queries, keys and values, or the gate and the up matrix of an MLP.

Knows torch modules only. Which rows belong to which part is found by tests on the model, not by names: architectures
store the parts one after the other, or interleaved by head. A part is an ordinary linear layer with a name, so that
it is found, compressed and counted like the same matrix of an architecture that does not fuse.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from compression.bonds import first_calls, linear_layer
from compression.sites import Site, dense_weight

__all__ = ["FusedLinear", "split_fused_"]

Runs = Mapping[str, Sequence[Sequence[int]]]
"""The rows of each part by its name, as (start, stop) of consecutive rows in ascending order."""


class FusedLinear(nn.Module):
    """Computes a linear map in named parts, each of which gives some of the outputs.

    Args:
        weight: (out, in).
        bias: (out,) or None.
        runs: the rows of every part; each row belongs to one part.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, runs: Runs) -> None:
        super().__init__()
        self.runs = {name: [(int(start), int(stop)) for start, stop in part] for name, part in runs.items()}
        self.out_features, self.in_features = weight.shape
        for name, rows in self.rows().items():
            self.add_module(name, linear_layer(weight[rows], None if bias is None else bias[rows]))

    def rows(self) -> dict[str, list[int]]:
        """Returns the rows of each part by its name, in the order of the outputs of the part."""
        return {name: [row for run in runs for row in range(*run)] for name, runs in self.runs.items()}

    def joined(self, parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        """Returns what all parts give, in the order of the fused matrix.

        Args:
            parts: a tensor of each part, in the order of the parts.
            dim: the axis along which each tensor has the rows of its part.
        """
        pieces: list[tuple[int, torch.Tensor]] = []
        for runs, values in zip(self.runs.values(), parts, strict=True):
            sizes = [stop - start for start, stop in runs]
            pieces += zip((start for start, _ in runs), torch.split(values, sizes, dim), strict=True)
        return torch.cat([values for _, values in sorted(pieces, key=lambda piece: piece[0])], dim)

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        """Maps (…, in) to (…, out)."""
        return self.joined([part(activations) for part in self.children()], dim=-1)


def split_fused_(model: nn.Module, sites: Iterable[Site]) -> list[str]:
    """Split every fused matrix into its parts, in place; the model computes the same as before.

    A fused matrix is one of two sites in a module, of which the other reads what the module makes of its outputs.

    Args:
        model: changed in place; maps `input_ids` to logits and has `get_input_embeddings()`.
        sites: its sites.

    Returns:
        The names of the matrices that were split. Call `compression.sites.discover_sites` again afterwards.
    """
    inside: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        inside[site.name.rpartition(".")[0]].append(site)
    pairs: dict[str, tuple[Site, Site]] = {}
    for parent, found in inside.items():
        if len(found) == 2 and not any(site.dense_because for site in found):
            reader, fused = sorted(found, key=lambda site: site.out_features)
            if fused.out_features > reader.in_features:
                pairs[parent] = fused, reader
    calls = first_calls(model, list(pairs))
    split = []
    for parent, (fused, reader) in pairs.items():
        if parent not in calls:
            continue
        module = model.get_submodule(fused.name)
        probe = _Probe(model.get_submodule(parent), module, model.get_submodule(reader.name), *calls[parent])
        parts = _gated(probe, fused, reader) or _attention(probe, fused)
        if parts:
            bias = module.bias
            assert bias is None or isinstance(bias, torch.Tensor)
            model.set_submodule(fused.name, FusedLinear(dense_weight(module), bias, parts))
            split.append(fused.name)
    return split


class _Probe:
    """Runs a module with other outputs of its fused matrix, and returns what reaches its reader."""

    def __init__(
        self, module: nn.Module, fused: nn.Module, reader: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._module, self._fused, self._reader = module, fused, reader
        self._args, self._kwargs = args, kwargs
        shapes: list[torch.Tensor] = []
        hook = fused.register_forward_hook(lambda module, args, output: shapes.append(output))
        try:
            with torch.no_grad():
                module(*args, **kwargs)
        finally:
            hook.remove()
        self.outputs = shapes[0]
        """The outputs of the fused matrix on a text (…, tokens, out)."""

    def read(self, outputs: torch.Tensor) -> torch.Tensor:
        """Returns the input of the reader (…, tokens, in) if the fused matrix gives these outputs."""
        caught: list[torch.Tensor] = []
        hooks = [
            self._fused.register_forward_hook(lambda module, args, output: outputs.view_as(output)),
            self._reader.register_forward_pre_hook(lambda module, args: caught.append(args[0])),
        ]
        try:
            self._module(*self._args, **self._kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        return caught[0]

    def random(self, scale: float = 1.0) -> torch.Tensor:
        """Returns random outputs, the same on every call, of the shape, type and device of the real ones."""
        drawn = torch.randn(self.outputs.shape, generator=torch.Generator().manual_seed(0))
        return (scale * drawn).to(self.outputs)


@torch.no_grad()
def _gated(probe: _Probe, fused: Site, reader: Site) -> Runs:
    """Returns the rows of gate and up; empty if what the reader reads is not the product of two halves.

    The module must be odd in the up half: if that is negated, so is what the reader reads. The activation of the other
    half is not odd. Without an activation both halves are, and the first one counts as the gate.
    """
    if fused.out_features != 2 * reader.in_features:
        return {}
    outputs, size = probe.random(), reader.in_features
    plain = probe.read(outputs)
    halves = ([(0, size)], [(size, 2 * size)])
    alternate = tuple([(row, row + 1) for row in range(first, 2 * size, 2)] for first in (0, 1))
    for one, other in (halves, alternate):
        for gate, up in ((one, other), (other, one)):
            negated = outputs.clone()
            negated[..., [row for run in up for row in range(*run)]] *= -1
            if torch.allclose(probe.read(negated), -plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max())):
                return {"gate": gate, "up": up}
    return {}


def _attention(probe: _Probe, fused: Site) -> Runs:
    """Returns the rows of q, k and v; empty if the module is no attention over them.

    * If all tokens have equal outputs, an attention averages equal values: its result depends on the values alone.
    * What the last token reads depends on the keys and values of the first token, but not on the query there.
    """
    same = probe.random()[..., :1, :].expand_as(probe.outputs)
    different = probe.random(scale=0.3)  # small, so that no token gets all attention
    of_values, of_first = _slope(probe, same)[0], _slope(probe, different, last=True)[1]
    values = of_values > 0.1 * of_values.max()
    read = of_first > 0
    parts = {"q": ~read, "k": read & ~values, "v": read & values}
    sizes = {name: int(chosen.sum()) for name, chosen in parts.items()}
    if not all(sizes.values()) or sizes["k"] != sizes["v"] or sizes["q"] % sizes["k"] or bool((values & ~read).any()):
        return {}
    return {name: _runs(chosen.nonzero().flatten().tolist()) for name, chosen in parts.items()}


@torch.enable_grad()
def _slope(probe: _Probe, outputs: torch.Tensor, last: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the absolute derivatives of what the reader reads by every row (out,): of all tokens, and of the first.

    Args:
        last: derive what is read at the last token only.
    """
    leaf = outputs.detach().clone().requires_grad_()
    found = probe.read(leaf)
    found = found[..., -1:, :] if last else found
    weights = 1 + torch.rand(found.shape, generator=torch.Generator().manual_seed(1))
    (found * weights.to(found)).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    by_token = leaf.grad.float().reshape(-1, leaf.shape[-2], leaf.shape[-1])[0]
    return by_token.sum(0).abs(), by_token[0].abs()


def _runs(rows: list[int]) -> list[tuple[int, int]]:
    """Returns ascending numbers as (start, stop) of consecutive ones."""
    starts = [rows[0], *(after for before, after in pairwise(rows) if after != before + 1)]
    stops = [*(before + 1 for before, after in pairwise(rows) if after != before + 1), rows[-1] + 1]
    return list(zip(starts, stops, strict=True))

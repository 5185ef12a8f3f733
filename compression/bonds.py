"""Finds the bonds between the matrices of a block: hidden values that some matrices write and one matrix reads.

Knows the module tree of a torch model; does not know transformers, schedules or statistics. A bond is proposed from
shapes and accepted only if a test on the model itself holds: after some of its groups are cut out of the matrices, the
module around them must give the same output as with the columns that read these groups set to zero. The test fails if
hidden values act on one another, are read twice, or if the module relies on their number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from compression.numerics.elimination import indices_of
from compression.refusal import Refusal
from compression.sites import Cut, Site, dense_weight, expert_of, first_of_kind, put_modules

__all__ = [
    "KEPT",
    "Bond",
    "bonds_by_kind",
    "cut",
    "discover_bonds",
    "first_calls",
    "hidden_states",
    "keep_",
    "linear_layer",
    "tolerance",
    "with_bonds",
]

KEPT = ("kept_rows", "kept_columns")
"""Names under which a layer stores which rows and columns of its dense matrix are left."""
_TOKENS = 6  # length of the text that bonds are tested on
_TOLERANCE = 1e-3  # largest difference of two outputs, relative to their largest entry, in float32


@dataclass(frozen=True)
class Bond:
    """Describes hidden values that some sites write and one site reads, in groups that are kept or removed together.

    Attributes:
        name: name of the module that holds the sites, such as "model.layers.3.mlp".
        block: index of the block, from 0.
        kind: "hidden" for the hidden units of an MLP, or "heads" for key/value groups of attention heads.
        writers: names of the sites that write the values.
        reader: name of the site that reads them.
        groups: number of groups, which is the full width of the bond.
        rows: consecutive rows per group, by writer.
        columns: consecutive columns per group of the reader.
        least: smallest legal width: 0 if the module works without any group, else 1.
    """

    name: str
    block: int
    kind: str
    writers: tuple[str, ...]
    reader: str
    groups: int
    rows: tuple[int, ...]
    columns: int
    least: int = 1

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the writers, then of the reader."""
        return (*self.writers, self.reader)

    def rows_of(self, site: str, kept: torch.Tensor) -> torch.Tensor | None:
        """Returns the rows of a site that belong to the kept groups, or None if the bond does not cut its rows."""
        if site not in self.writers:
            return None
        return indices_of(kept, self.rows[self.writers.index(site)])

    def columns_of(self, site: str, kept: torch.Tensor) -> torch.Tensor | None:
        """Returns the columns of a site that belong to the kept groups, or None if the bond does not cut them."""
        return indices_of(kept, self.columns) if site == self.reader else None


def discover_bonds(model: nn.Module, sites: Sequence[Site]) -> tuple[Bond, ...]:
    """Returns the bonds of a model whose test holds, in block order.

    Args:
        model: the dense model in evaluation mode; maps `input_ids` to logits and has `get_input_embeddings()`.
        sites: its sites. A bond joins only sites that can be tensorized.
    """
    inside: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        inside[site.name.rpartition(".")[0]].append(site)
    candidates = {
        parent: list(_candidates(parent, model.get_submodule(parent), indices_of))
        for parent, indices_of in inside.items()
    }
    calls = _shared_calls(first_calls(model, [parent for parent, found in candidates.items() if found]), inside)
    held = []
    for parent, found in candidates.items():
        for bond in found if parent in calls else ():
            half = torch.randperm(bond.groups, generator=torch.Generator().manual_seed(0))[: -(-bond.groups // 2)]
            if _holds(model, bond, half.sort().values, *calls[parent]):
                without = _holds(model, bond, half[:0], *calls[parent])
                held.append(replace(bond, least=0 if without else 1))
    return tuple(held)


def bonds_by_kind(model: nn.Module, sites: Sequence[Site]) -> tuple[Bond, ...]:
    """Returns what `discover_bonds` returns, but tests only one block of every kind.

    Other blocks of its kind have its bonds, see `compression.sites.first_of_kind`.
    """
    prefix, like = first_of_kind(model)
    tested = discover_bonds(model, [site for site in sites if like[site.block] == site.block])
    return tuple(
        _in_block(bond, prefix, index) for index, kind in enumerate(like) for bond in tested if bond.block == kind
    )


def _in_block(bond: Bond, prefix: str, index: int) -> Bond:
    """The same bond in another block."""

    def renamed(name: str) -> str:
        return f"{prefix}.{index}.{name.removeprefix(f'{prefix}.{bond.block}.')}"

    writers = tuple(map(renamed, bond.writers))
    return replace(bond, name=renamed(bond.name), block=index, writers=writers, reader=renamed(bond.reader))


def with_bonds(sites: Sequence[Site], bonds: Sequence[Bond]) -> tuple[Site, ...]:
    """Returns the sites with their cuts by these bonds.

    Raises:
        ValueError: the sites of a bond are not adjacent, or a site has two bonds.
    """
    cuts: dict[str, Cut] = {}
    places = {site.name: place for place, site in enumerate(sites)}
    for bond in bonds:
        at = sorted(places[name] for name in bond.sites)
        if at != list(range(at[0], at[0] + len(at))) or any(name in cuts for name in bond.sites):
            raise Refusal(f"the sites of {bond.name} must be adjacent and have no other bond")
        for name, size in zip(bond.writers, bond.rows, strict=True):
            cuts[name] = Cut(bond.name, bond.groups, size, of_rows=True, least=bond.least)
        cuts[bond.reader] = Cut(bond.name, bond.groups, bond.columns, of_rows=False, least=bond.least)
    return tuple(replace(site, cuts=(cuts[site.name],)) if site.name in cuts else site for site in sites)


def cut(module: nn.Module, rows: torch.Tensor | None, columns: torch.Tensor | None) -> nn.Linear:
    """Returns a linear layer with some of the rows and columns of a linear module, and the bias of its rows.

    The layer stores which ones they are, see `keep_`.

    Args:
        module: a module that `compression.sites` counts as linear.
        rows, columns: indices of what to keep; None keeps all.
    """
    weight, bias = dense_weight(module), module.bias
    assert bias is None or isinstance(bias, torch.Tensor)
    shape = tuple(weight.shape)
    if rows is not None:
        weight = weight[rows.to(weight.device)]
        bias = bias if bias is None else bias[rows.to(bias.device)]
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    layer = linear_layer(weight, bias)
    keep_(layer, shape, *(each if each is None else each.to(weight.device) for each in (rows, columns)))
    return layer


def keep_(
    layer: nn.Module, shape: tuple[int, ...], rows: torch.Tensor | None, columns: torch.Tensor | None
) -> nn.Module:
    """Store in a layer which rows and columns of its dense matrix it holds; returns the layer.

    Args:
        shape: shape of the dense matrix. Nothing is stored for a side of which nothing was removed.
        rows, columns: ascending numbers of what is left; None means everything.
    """
    for name, size, numbers in zip(KEPT, shape, (rows, columns), strict=True):
        if numbers is not None and len(numbers) < size:
            layer.register_buffer(name, numbers.to(dtype=torch.int32))
    return layer


def linear_layer(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Returns a linear layer that holds these tensors, without gradients."""
    layer = nn.Linear(1, 1, bias is not None, device="meta")  # made without entries, it would warn
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _candidates(parent: str, module: nn.Module, inside: Sequence[Site]) -> Iterator[Bond]:
    """Yields the bonds that shapes allow inside one module. The reader is the site that is run last."""
    free = [site for site in inside if not site.dense_because]
    if len(free) < 2 or len(free) != len(inside):
        return
    *writers, reader = free
    names, outs = tuple(site.name for site in writers), [site.out_features for site in writers]
    if all(out == reader.in_features for out in outs) and len(writers) <= 2:
        yield Bond(parent, reader.block, "hidden", names, reader.name, reader.in_features, (1,) * len(writers), 1)
    size = getattr(module, "head_dim", None)
    if not isinstance(size, int) or len(writers) != 3 or size < 1:
        return
    groups = min(outs) // size
    if groups > 1 and not reader.in_features % groups and not any(out % (groups * size) for out in outs):
        rows = tuple(out // groups for out in outs)
        yield Bond(parent, reader.block, "heads", names, reader.name, groups, rows, reader.in_features // groups)


def _shared_calls(
    calls: Mapping[str, tuple[tuple[Any, ...], dict[str, Any]]], inside: Mapping[str, Sequence[Site]]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Returns the calls, and for an expert that the short text did not reach the call of another one of its list."""
    lists = {parent: expert[0] for parent, sites in inside.items() if (expert := expert_of(sites[0])) is not None}
    of_list = {lists[parent]: call for parent, call in calls.items() if parent in lists}
    return {**{parent: of_list[name] for parent, name in lists.items() if name in of_list}, **calls}


@torch.no_grad()
def first_calls(model: nn.Module, parents: Sequence[str]) -> Mapping[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Returns the arguments of the first call of each module in a pass over a short text."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    hooks, missing = [], set(parents)
    for parent in parents:

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], parent: str = parent) -> None:
            calls.setdefault(parent, (args, kwargs))
            missing.discard(parent)
            if not missing:
                raise _AllCalled

        hooks.append(model.get_submodule(parent).register_forward_pre_hook(note, with_kwargs=True))
    embeddings = model.get_input_embeddings().weight  # type: ignore[operator]
    ids = torch.arange(_TOKENS, device=embeddings.device)[None] % len(embeddings)
    try:
        if parents:
            model(input_ids=ids, use_cache=False)
    except _AllCalled:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return calls


class _AllCalled(Exception):
    """Stops a forward pass once every module of interest was called."""


@torch.no_grad()
def _holds(model: nn.Module, bond: Bond, kept: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether cutting out all but the kept groups is the same as not reading them."""
    module = model.get_submodule(bond.name)
    taken = {name: model.get_submodule(name) for name in bond.sites}
    weight = dense_weight(taken[bond.reader])
    bias = taken[bond.reader].bias
    assert bias is None or isinstance(bias, torch.Tensor)
    unread = torch.zeros_like(weight)
    columns = bond.columns_of(bond.reader, kept)
    unread[:, columns] = weight[:, columns]
    try:
        model.set_submodule(bond.reader, linear_layer(unread, bias))
        expected = hidden_states(module(*args, **kwargs))
        put_modules(
            model,
            {name: cut(old, bond.rows_of(name, kept), bond.columns_of(name, kept)) for name, old in taken.items()},
        )
        found = hidden_states(module(*args, **kwargs))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, ArithmeticError):
        return False
    finally:
        put_modules(model, taken)
    if expected is None or found is None or found.shape != expected.shape:
        return False
    scale = float(expected.float().abs().max())
    return bool((found - expected).float().abs().max() <= tolerance(expected.dtype) * scale)


def tolerance(dtype: torch.dtype) -> float:
    """Returns the largest difference of two outputs that counts as rounding, relative to their largest entry."""
    return _TOLERANCE if dtype == torch.float32 else 30 * _TOLERANCE


def hidden_states(output: object) -> torch.Tensor | None:
    """Returns the hidden states in the output of a module: the output itself or its first entry."""
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, torch.Tensor) else None

"""Finds the weight matrices of a model that may be tensorized, and states why the others stay dense.

Knows the module tree of a torch model; does not know transformers, schedules or factors. Families are discovered from
the module names inside the repeated block, not hard-coded. Embeddings and the output head lie outside the blocks and
stay dense.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from math import prod

import torch
from torch import nn

from compression.numerics.elimination import indices_of
from compression.numerics.finite import is_finite
from compression.refusal import Refusal

__all__ = [
    "Cut",
    "Site",
    "Unit",
    "check_weight",
    "check_widths",
    "dense_weight",
    "discover_sites",
    "expert_of",
    "find_blocks",
    "first_of_kind",
    "members",
    "model_bytes",
    "model_parameters",
    "put_modules",
    "replaced",
    "router_weights",
    "units",
]

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_MATTERS = 16  # a matrix with sides so many times shorter than is usual in its block stays dense
_ROLES = ("q", "k", "v", "o", "gate", "up", "down")
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Cut:
    """Describes how a bond between matrices cuts one of its sites.

    Attributes:
        bond: name of the bond, see `compression.bonds.Bond`.
        groups: full width of the bond.
        size: consecutive rows or columns of the site per group.
        of_rows: whether the site writes the bond, which then cuts its rows; otherwise it reads it with its columns.
        least: smallest legal width: 0 if the module works without any group, else 1.
    """

    bond: str
    groups: int
    size: int
    of_rows: bool
    least: int = 1

    def indices(self, groups: torch.Tensor) -> torch.Tensor:
        """Returns the indices of the rows or columns of the site that belong to these groups."""
        return indices_of(groups, self.size)


@dataclass(frozen=True)
class Site:
    """Describes one weight matrix W of shape (out_features, in_features) inside block `block` (counted from 0).

    A tensor of more than two axes is described with its last axis as `in_features` and the others multiplied together.

    Attributes:
        dense_because: why the matrix cannot be tensorized; it then stays dense and counts as dense. Empty if the
            matrix can be tensorized.
        cuts: the bonds between this matrix and others, in the order of the widths of a `compression.schedule.Choice`.
    """

    name: str
    block: int
    family: str
    out_features: int
    in_features: int
    dense_because: str = ""
    cuts: tuple[Cut, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of entries of the dense matrix. A bias is never tensorized and is not counted."""
        return self.out_features * self.in_features

    def shape(self, widths: tuple[int, ...] = ()) -> tuple[int, int]:
        """Returns the rows and columns that are left when the bonds have these widths.

        Args:
            widths: one width per cut; empty if all bonds have their full width.

        Raises:
            ValueError: there is not one width per cut, or one is not between the smallest and the full width.
        """
        if widths and len(widths) != len(self.cuts):
            raise Refusal(f"{self.name} has {len(self.cuts)} bonds to other matrices, got {len(widths)} widths")
        rows, columns = self.out_features, self.in_features
        for cut, width in zip(self.cuts, widths, strict=False):
            if not cut.least <= width <= cut.groups:
                raise Refusal(f"the width of {cut.bond} must be between {cut.least} and {cut.groups}, got {width}")
            if cut.of_rows:
                rows = rows // cut.groups * width
            else:
                columns = columns // cut.groups * width
        return rows, columns


@dataclass(frozen=True)
class Unit:
    """The sites of one block that a bond joins; a schedule chooses for all of them at once.

    Attributes:
        name: name of the bond, which is that of the module around the sites.
        block: index of the block.
        family: last part of the name, such as "mlp".
        sites: the sites, adjacent in discovery order.
    """

    name: str
    block: int
    family: str
    sites: tuple[Site, ...]
    dense_because: str = ""

    @property
    def groups(self) -> int:
        """Full width of the bond."""
        return self.sites[0].cuts[0].groups

    @property
    def parameters(self) -> int:
        """Number of entries of all dense matrices."""
        return sum(site.parameters for site in self.sites)


def members(unit: Site | Unit) -> tuple[Site, ...]:
    """Returns the sites of a unit, or the site itself."""
    return unit.sites if isinstance(unit, Unit) else (unit,)


def units(sites: Sequence[Site]) -> list[Site | Unit]:
    """Returns what a schedule chooses for at once, in discovery order: units of bonds, and sites without a bond."""
    found: list[Site | Unit] = []
    for bond, members in groupby(sites, key=lambda site: site.cuts[0].bond if site.cuts else ""):
        inside = tuple(members)
        found += [Unit(bond, inside[0].block, _NUMBER.sub("", bond).rsplit(".", 1)[-1], inside)] if bond else inside
    return found


def expert_of(site: Site) -> tuple[str, int] | None:
    """Returns the name of the list of experts whose member holds a site, and the member's number; None if none does."""
    path = site.name.partition(f".{site.block}.")[2]
    experts, _, number = path.rpartition(".")[0].rpartition(".")
    return (site.name.removesuffix(path) + experts, int(number)) if experts and number.isdecimal() else None


@dataclass(frozen=True)
class _Matrix:
    """Describes a parameter of two or more axes inside a block.

    Attributes:
        path: name of the parameter within the block.
        values: the parameter as (…, in); a view, transposed if the module stores it transposed.
        parameter: the parameter as stored.
        dense_because: why its kind cannot be tensorized; empty for the weight of a linear map.
    """

    path: str
    values: torch.Tensor
    parameter: nn.Parameter
    dense_because: str = ""


def discover_sites(model: nn.Module, shapes_only: bool = False) -> tuple[Site, ...]:
    """Returns the sites of `model` in module order.

    Every parameter of two or more axes inside a block (see `find_blocks`) is a site; a weight shared by two places
    counts once. A site can be tensorized if it is the weight of a linear map (`nn.Linear`, or the transposed `Conv1D`
    of GPT-2), nothing else uses it, and two factors of rank 1 have fewer entries than it. The other sites state in
    `dense_because` why they stay dense.

    Args:
        shapes_only: skip the check of the values, which also allows a model on the meta device. The code that loads the
            values must then call `check_weight`.

    Raises:
        ValueError: the model has no list of blocks; `check_weight` rejects a matrix; or a linear map holds no matrix of
            its shape. The last two messages name the site.
    """
    prefix, blocks = find_blocks(model)
    users: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users[id(parameter)].append(name)
    sites: list[Site] = []
    seen: set[int] = set()
    for index, block in enumerate(blocks):
        matrices = list(_matrices(block, f"{prefix}.{index}", shapes_only))
        families = _families([matrix.path for matrix in matrices])
        sides = sorted(max(matrix.values.shape) for matrix in matrices)
        for matrix in matrices:
            if id(matrix.parameter) in seen:
                continue
            seen.add(id(matrix.parameter))
            shape = prod(matrix.values.shape[:-1]), matrix.values.shape[-1]
            reason = _dense_because(matrix, users[id(matrix.parameter)], sides[len(sides) // 2])
            sites.append(Site(f"{prefix}.{index}.{matrix.path}", index, families[matrix.path], *shape, reason))
    return tuple(sites)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Returns the name and value of the list of blocks of a dense model.

    The blocks are those of the innermost module that holds both the embedding of tokens and a list of blocks. In an
    image-text model these are the blocks of the language part, however large the vision tower is. If that module has
    several lists, the one whose linear maps hold the most parameters counts, and the longest if they tie.

    Raises:
        ValueError: the model has no list of modules that hold linear maps.
    """
    for around in _around_embedding(model):
        best, chosen = (0, 0), None  # parameters and length
        for name, module in model.get_submodule(around).named_modules(prefix=around):
            if isinstance(module, nn.ModuleList):
                weights = [inner.weight for inner in module.modules() if _is_linear(inner)]
                rank = (sum(weight.numel() for weight in weights if isinstance(weight, torch.Tensor)), len(module))
                if weights and rank > best:
                    best, chosen = rank, (name, module)
        if chosen is not None:
            return chosen
    raise Refusal("no tensorizable site: the model has no nn.ModuleList of blocks that hold linear maps")


def _around_embedding(model: nn.Module) -> Iterator[str]:
    """Yields the names of the modules around the embedding of tokens, innermost first; the last one is the model."""
    find = getattr(model, "get_input_embeddings", None)
    embedding = find() if find is not None else None
    parts = next((name for name, module in model.named_modules() if module is embedding), "").split(".")
    yield from (".".join(parts[:count]) for count in range(len(parts) - 1, -1, -1))


def first_of_kind(model: nn.Module) -> tuple[str, list[int]]:
    """Returns the name of the list of blocks, and for every block the first one of its kind.

    Blocks are of a kind if they are made of the same modules of the same sizes.
    """
    prefix, blocks = find_blocks(model)
    first: dict[str, int] = {}
    return prefix, [first.setdefault(repr(block), index) for index, block in enumerate(blocks)]


def check_weight(name: str, weight: torch.Tensor, shapes_only: bool = False) -> None:
    """Reject a weight that cannot be decomposed. The message names the site.

    Raises:
        ValueError: the weight is empty or not of a supported floating-point type; or, unless `shapes_only`, it is on
            the meta device or has NaN or infinite entries.
    """
    if weight.dtype not in _FLOATING:
        wanted, got = ", ".join(map(_short, _FLOATING)), _short(weight.dtype)
        raise Refusal(f"site {name}: the weight must be one of {wanted}, got {got}; load the model dense")
    if weight.numel() == 0:
        raise Refusal(f"site {name}: the weight is empty, of shape {tuple(weight.shape)}")
    if shapes_only:
        return
    if weight.is_meta:
        raise Refusal(f"site {name}: the weight has no values, it is on the meta device; load the model first")
    if not is_finite(weight):
        raise Refusal(f"site {name}: the weight has NaN or infinite entries")


def check_widths(sites: Sequence[Site], widths: Mapping[str, tuple[int, ...]]) -> None:
    """Check that sites can be cut to these widths.

    Args:
        widths: by site name, one width per cut; empty if all bonds have their full width.

    Raises:
        ValueError: as for `Site.shape`; or a bond would have different widths at two of its sites.
    """
    first: dict[str, tuple[str, int]] = {}
    for site in sites:
        site.shape(widths[site.name])
        for cut, width in zip(site.cuts, widths[site.name] or [cut.groups for cut in site.cuts], strict=True):
            name, known = first.setdefault(cut.bond, (site.name, width))
            if known != width:
                raise Refusal(f"{name} and {site.name} must have the same width, as {cut.bond} joins them")


def dense_weight(module: nn.Module) -> torch.Tensor:
    """Returns the weight of a linear module as (out, in), whichever way the module stores it. A view, not a copy."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight if isinstance(module, nn.Linear) else weight.T


def put_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Replace modules of `model` by qualified name."""
    for name, module in modules.items():
        model.set_submodule(name, module)


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside the context, `model` has these modules by qualified name; afterwards it has its former ones again."""
    taken = {name: model.get_submodule(name) for name in modules}
    put_modules(model, modules)
    try:
        yield
    finally:
        put_modules(model, taken)


def router_weights(model: nn.Module) -> frozenset[str]:
    """Returns the names of the matrices that choose among the experts of a layer, one row per expert."""
    return frozenset(
        f"{path}.{name}"
        for path, module in model.named_modules()
        if (count := _experts(module)) > 1
        for name, values in module.named_parameters(recurse=False)
        if values.ndim == 2 and len(values) == count
    )


def model_parameters(model: nn.Module) -> int:
    """Returns the number of parameters of the whole model, tied weights counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def model_bytes(model: nn.Module, itemsize: int | None = None) -> int:
    """Returns the bytes of all parameters of the model, tied weights counted once.

    Args:
        itemsize: bytes of a stored number; None for those that the parameters take in memory.
    """
    return sum(parameter.numel() * (itemsize or parameter.element_size()) for parameter in model.parameters())


def _matrices(block: nn.Module, prefix: str, shapes_only: bool) -> Iterator[_Matrix]:
    """Yields every parameter of two or more axes in a block, checked. `prefix` is the name of the block."""
    routed = {path.rpartition(".")[0]: count for path, module in block.named_modules() if (count := _experts(module))}
    for path, module in block.named_modules():
        experts = routed.get(path.rpartition(".")[0], 0)
        if _is_linear(module):
            weight = module.weight
            if not isinstance(weight, nn.Parameter):
                raise Refusal(
                    f"site {prefix}.{path}: the weight must be a parameter, but is computed; remove its parametrization"
                )
            check_weight(f"{prefix}.{path}", weight, shapes_only)
            yield _Matrix(path, dense_weight(module), weight, _router(weight, experts))
            continue
        own = [(name, values) for name, values in module.named_parameters(recurse=False) if values.ndim > 1]
        if _lacks_matrix(module, [values for _, values in own]):
            raise Refusal(
                f"site {prefix}.{path}: a {type(module).__name__} holds no matrix of its shape; load the model dense"
            )
        for name, values in own:
            inner = f"{path}.{name}".removeprefix(".").removesuffix(".weight")
            check_weight(f"{prefix}.{inner}", values, shapes_only)
            yield _Matrix(inner, values, values, _router(values, experts) or _not_linear(module, values))


def _experts(module: nn.Module) -> int:
    """The number of experts that a router or a layer of experts states, or that such a layer holds; otherwise 0."""
    stated = getattr(module, "num_experts", None)
    if isinstance(stated, int):
        return stated
    held = isinstance(module, nn.ModuleList) and any(_is_linear(inner) for inner in module.modules())
    return len(module) if held else 0  # type: ignore[arg-type]


def _router(values: torch.Tensor, experts: int) -> str:
    """Why a matrix stays dense if it has a row for each of the experts beside it; otherwise an empty text."""
    return f"chooses among {experts} experts" if experts > 1 and values.ndim == 2 and len(values) == experts else ""


def _not_linear(module: nn.Module, values: torch.Tensor) -> str:
    """Why a parameter of a module that is no linear layer stays dense."""
    if values.ndim == 3 and min(values.shape[1:]) > 1 and not isinstance(module, nn.modules.conv._ConvNd):
        return f"{len(values)} matrices are fused in one tensor"
    return "not the weight of a linear map"


def _lacks_matrix(module: nn.Module, own: Sequence[torch.Tensor]) -> bool:
    """Whether a module states the shape of a linear map but neither it nor its submodules hold such a matrix."""
    shape = {getattr(module, "out_features", None), getattr(module, "in_features", None)}
    if None in shape or any(set(values.shape) == shape for values in own):
        return False
    return not any(_is_linear(inner) for inner in module.modules())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dense_because(matrix: _Matrix, users: list[str], usual: int) -> str:
    """Why a matrix must stay dense; empty if it need not. `usual` is the median longer side in its block."""
    if matrix.dense_because:
        return matrix.dense_because
    if len(users) > 1:
        return f"shared by {' and '.join(user.removesuffix('.weight') for user in users)}"
    outputs, inputs = matrix.values.shape
    if outputs * inputs <= outputs + inputs:
        return f"{outputs} × {inputs} is too small to factor"
    if max(outputs, inputs) * _MATTERS <= usual:
        return f"{outputs} × {inputs} is too small to matter"
    return ""


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor) and weight.ndim == 2


def _families(paths: list[str]) -> dict[str, str]:
    """Returns the family name of each path: its role if the last part names one, else that part.

    The whole path is the name where several matrices of the block would have the same, such as a router `gate` and the
    `gate_proj` of an expert.
    """
    without_index = {path: _NUMBER.sub("", path) for path in paths}
    roles = {name: _role(name.rsplit(".", 1)[-1]) for name in without_index.values()}
    counts = Counter(roles.values())
    return {path: roles[name] if counts[roles[name]] == 1 else name for path, name in without_index.items()}


def _role(leaf: str) -> str:
    """The last part of a module name, without `_proj` if that leaves a role; `c_proj` and `in_proj` stay."""
    return leaf.removesuffix("_proj") if leaf.removesuffix("_proj") in _ROLES else leaf

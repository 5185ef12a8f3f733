"""Sites: which weight matrices of a model may be tensorized, and which stay dense and why.

Knows the module tree of a torch model, nothing of transformers, schedules or factors. Families are discovered from the
module names inside the repeated block, not hard-coded; embeddings and the output head lie outside the blocks and stay
dense.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from compression.refusal import Refusal

__all__ = [
    "Site",
    "check_weight",
    "dense_weight",
    "discover_sites",
    "find_blocks",
    "model_bytes",
    "model_parameters",
    "put_modules",
]

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Site:
    """One weight matrix W of shape (out_features, in_features) inside block `block` (from 0).

    Attributes:
        dense_because: why the matrix cannot be tensorized; it then stays dense and counts as dense. Empty for one that
            can. A tensor of more than two axes counts with its last one as `in_features`.
    """

    name: str
    block: int
    family: str
    out_features: int
    in_features: int
    dense_because: str = ""

    @property
    def parameters(self) -> int:
        """Entries of the dense matrix; a bias is never tensorized and not counted."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class _Matrix:
    """A parameter of two axes or more inside a block: its path there, and whether it is the weight of a linear map."""

    path: str
    values: torch.Tensor
    parameter: nn.Parameter
    linear: bool


def discover_sites(model: nn.Module, shapes_only: bool = False) -> tuple[Site, ...]:
    """Sites of `model` in module order.

    The blocks are the `nn.ModuleList` of the tree whose linear maps hold the most parameters, the longest if several
    do. Every parameter of two axes or more inside a block is a site; a weight shared by two places counts once. What
    can be tensorized is the weight of a linear map (`nn.Linear`, or the transposed `Conv1D` of GPT-2) that nothing else
    uses and that two factors of rank 1 make smaller; the others say in `dense_because` why they stay dense.

    Args:
        shapes_only: do not look at values, so that a model on the meta device will do; whoever loads them calls
            `check_weight`.

    Raises:
        ValueError: the model has no such list; or, by name, a matrix as `check_weight`, or a linear map that holds no
            matrix of its shape.
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
        for matrix in matrices:
            if id(matrix.parameter) in seen:
                continue
            seen.add(id(matrix.parameter))
            shape = prod(matrix.values.shape[:-1]), matrix.values.shape[-1]
            reason = _dense_because(matrix, users[id(matrix.parameter)])
            sites.append(Site(f"{prefix}.{index}.{matrix.path}", index, families[matrix.path], *shape, reason))
    return tuple(sites)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and value of the list of blocks of a dense model.

    Raises:
        ValueError: the model has no list of modules that hold linear maps.
    """
    best, chosen = (0, 0), None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            weights = [inner.weight for inner in module.modules() if _is_linear(inner)]
            rank = (sum(weight.numel() for weight in weights if isinstance(weight, torch.Tensor)), len(module))
            if weights and rank > best:
                best, chosen = rank, (name, module)
    if chosen is None:
        raise Refusal("no tensorizable site: the model has no nn.ModuleList of blocks that hold linear maps")
    return chosen


def check_weight(name: str, weight: torch.Tensor, shapes_only: bool = False) -> None:
    """Refuse a weight that cannot be decomposed, by the name of its site.

    Raises:
        ValueError: it has NaN or infinite entries or is on the meta device, unless `shapes_only`; it is empty, or not
            of a floating-point type that matrices are stored in.
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
    if not torch.isfinite(weight).all():
        raise Refusal(f"site {name}: the weight has NaN or infinite entries")


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a linear module as (out, in), whatever way the module stores it. A view, not a copy."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight if isinstance(module, nn.Linear) else weight.T


def put_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules in their places by qualified name."""
    for name, module in modules.items():
        model.set_submodule(name, module)


def model_parameters(model: nn.Module) -> int:
    """Parameters of the whole model, tied weights counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def model_bytes(model: nn.Module) -> int:
    """Bytes of the parameters of the whole model at their stored precision, tied weights counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _matrices(block: nn.Module, prefix: str, shapes_only: bool) -> Iterator[_Matrix]:
    """Every parameter of two axes or more in a block, checked; `prefix` is the name of the block."""
    for path, module in block.named_modules():
        if _is_linear(module):
            weight = module.weight
            if not isinstance(weight, nn.Parameter):
                raise Refusal(
                    f"site {prefix}.{path}: the weight must be a parameter, but is computed; remove its parametrization"
                )
            check_weight(f"{prefix}.{path}", weight, shapes_only)
            yield _Matrix(path, dense_weight(module), weight, linear=True)
            continue
        own = [(name, values) for name, values in module.named_parameters(recurse=False) if values.ndim > 1]
        if _lacks_matrix(module, [values for _, values in own]):
            raise Refusal(
                f"site {prefix}.{path}: a {type(module).__name__} holds no matrix of its shape; load the model dense"
            )
        for name, values in own:
            inner = f"{path}.{name}".removeprefix(".").removesuffix(".weight")
            check_weight(f"{prefix}.{inner}", values, shapes_only)
            yield _Matrix(inner, values, values, linear=False)


def _lacks_matrix(module: nn.Module, own: Sequence[torch.Tensor]) -> bool:
    """Whether a module states the shape of a linear map but neither it nor a part of it holds such a matrix."""
    shape = {getattr(module, "out_features", None), getattr(module, "in_features", None)}
    if None in shape or any(set(values.shape) == shape for values in own):
        return False
    return not any(_is_linear(inner) for inner in module.modules())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dense_because(matrix: _Matrix, users: list[str]) -> str:
    if not matrix.linear:
        return "not the weight of a linear map"
    if len(users) > 1:
        return f"shared by {' and '.join(user.removesuffix('.weight') for user in users)}"
    outputs, inputs = matrix.values.shape
    if outputs * inputs <= outputs + inputs:
        return f"{outputs} × {inputs} is too small to factor"
    return ""


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor) and weight.ndim == 2


def _families(paths: list[str]) -> dict[str, str]:
    """Shortest telling name per path: the leaf without `_proj`, or the whole path where leaves repeat in a block."""
    without_index = {path: re.sub(r"\.\d+(?=\.|$)", "", path) for path in paths}
    leaves = Counter(name.rsplit(".", 1)[-1] for name in set(without_index.values()))
    families = {}
    for path, name in without_index.items():
        leaf = name.rsplit(".", 1)[-1]
        families[path] = leaf.removesuffix("_proj") if leaves[leaf] == 1 else name
    return families

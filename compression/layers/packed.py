"""Defines packed modules: a linear layer, an embedding and an `MPOLinear` that store group-wise integers.

Knows tensors and modules; does not know how numbers are rounded. The integers stay packed in memory and are unpacked on
every use, in the type in which the rest of the model computes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.func import functional_call

from compression.layers.filled_linear import FilledLinear
from compression.layers.mpo_linear import MPOLinear
from compression.numerics.group_integers import Codes, dequantize
from compression.numerics.packed_size import BITS
from compression.refusal import Refusal

__all__ = ["PackedEmbedding", "PackedLinear", "PackedMPO", "PackedMatrix", "empty_packed"]

_LARGEST = 1 << 20  # numbers that may share a scale


class PackedMatrix(nn.Module):
    """Holds a (rows, columns) matrix as packed integers.

    The bits of the float16 scales are stored as int16, so casting a model to another type does not change them.

    Attributes:
        change: while the scales are trained, the relative change of each; otherwise None. See
            `compression.training.scales`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    like: torch.Tensor
    change: nn.Parameter | None

    def __init__(self, codes: Codes, columns: int, bits: int, group: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.columns, self.bits, self.group = columns, bits, group
        self.register_buffer("codes", codes.codes)
        self.register_buffer("scales", codes.scales.view(torch.int16))
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=codes.codes.device), persistent=False)
        self.register_parameter("change", None)

    def matrix(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns the matrix (rows, columns) in `dtype`, by default the type of the model."""
        scales = self.scales.view(torch.float16)
        if self.change is not None:
            scales = scales * (1 + self.change)
        scales = scales.to(self.like.dtype if dtype is None else dtype)
        return dequantize(self.codes, scales, self.columns, self.bits, self.group)

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """Returns the rows with the given numbers (…), (…, columns)."""
        scales = self.scales[numbers].view(torch.float16).to(self.like.dtype)
        return dequantize(self.codes[numbers], scales, self.columns, self.bits, self.group)


def empty_packed(rows: int, columns: int, bits: object, group: object, dtype: torch.dtype) -> PackedMatrix:
    """Returns a packed matrix (rows, columns) on the meta device; raises ValueError for other bits or groups."""
    if bits not in BITS or type(bits) is not int or type(group) is not int or not 1 <= group <= _LARGEST:
        known = f"{', '.join(map(str, BITS[:-1]))} or {BITS[-1]}"
        raise Refusal(f"bits must be {known} and group 1 to {_LARGEST}, got {bits!r:.80} and {group!r:.80}")
    codes = torch.empty(rows, -(-columns * bits // 8), dtype=torch.uint8, device="meta")
    scales = torch.empty(rows, -(-columns // group), dtype=torch.float16, device="meta")
    return PackedMatrix(Codes(codes, scales), columns, bits, group, dtype)


class PackedLinear(FilledLinear):
    """Computes y = W x + b with packed W, see `compression.layers.filled_linear`.

    Args:
        matrix: W (out, in).
        bias: (out,) or None.
        tied: name of the embedding that W belongs to; this layer then does not store W itself. Empty if not shared.
    """

    def __init__(self, matrix: PackedMatrix, bias: torch.Tensor | None = None, tied: str = "") -> None:
        super().__init__((len(matrix.codes), matrix.columns), bias)
        self.tied = tied
        self._shared = [matrix] if tied else []  # in a list, so it is no submodule and its tensors are not listed twice
        if not tied:
            self.packed = matrix

    @property
    def stored(self) -> PackedMatrix:
        """The packed matrix W."""
        return self._shared[0] if self.tied else self.packed

    def fill(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns W (out, in), unpacked; gradients reach changes of its scales."""
        return self.stored.matrix(dtype)


class PackedEmbedding(nn.Module):
    """Looks up rows of a packed matrix by number."""

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.packed = matrix

    @property
    def weight(self) -> torch.Tensor:
        """The table (rows, columns), unpacked on every access."""
        return self.packed.matrix()

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Maps integers (…) to rows (…, columns)."""
        return self.packed.rows(numbers)


class PackedMPO(nn.Module):
    """Computes an `MPOLinear` with packed cores.

    Each core is packed as a matrix whose columns are its last axis, or the one before if the last has length 1.

    Args:
        layer: defines the shapes and the plan; moved to the meta device, so its values are not kept.
        packed: packed cores and tails by their names in `layer`.
    """

    def __init__(self, layer: MPOLinear, packed: Mapping[str, PackedMatrix]) -> None:
        super().__init__()
        self.packed = nn.ModuleDict(packed)
        state = layer.state_dict()
        self._places = [name for name in state if name.startswith("places_")]
        self._shapes = {name: tuple(state[name].shape) for name in packed}
        for name in self._places:
            self.register_buffer(name, state[name])
        self.register_parameter("bias", layer._parameters["bias"])
        self._layer = [layer.to(device="meta")]  # in a list, so it is no submodule and its tensors are not listed
        self.legs, self.bonds = layer.legs, layer.bonds
        self.out_features, self.in_features = layer.out_features, layer.in_features

    @property
    def weight(self) -> torch.Tensor:
        """The dense matrix (out, in), computed on every access."""
        first = next(iter(self.packed.values()))
        assert isinstance(first, PackedMatrix)
        columns = torch.eye(self.in_features, dtype=first.like.dtype, device=first.codes.device)
        with torch.no_grad():
            result: torch.Tensor = self(columns)
            if self._parameters["bias"] is not None:
                result = result - self._parameters["bias"]
        return result.T.contiguous()

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        """Maps (…, in) to (…, out)."""
        tensors = {name: getattr(self, name) for name in self._places}
        for name, matrix in self.packed.items():
            assert isinstance(matrix, PackedMatrix)
            tensors[name] = matrix.matrix(activations.dtype).reshape(self._shapes[name])
        if (bias := self._parameters["bias"]) is not None:
            tensors["bias"] = bias
        result: torch.Tensor = functional_call(self._layer[0], tensors, (activations,))
        return result

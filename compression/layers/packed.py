"""Packed modules: a linear layer, an embedding and an `MPOLinear` whose numbers are kept as group-wise integers.

Know tensors and modules. The integers stay packed in memory and are turned into numbers when used, in the type that the
rest of the model computes in; nothing is kept beside them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from compression.layers.mpo_linear import MPOLinear
from compression.numerics.group_integers import Codes, dequantize

__all__ = ["PackedEmbedding", "PackedLinear", "PackedMPO", "PackedMatrix"]


class PackedMatrix(nn.Module):
    """A (rows, columns) matrix of integers.

    Scales are kept as the bits of float16 in int16, so that casting a model to another type leaves them as they are.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    like: torch.Tensor

    def __init__(self, codes: Codes, columns: int, bits: int, group: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.columns, self.bits, self.group = columns, bits, group
        self.register_buffer("codes", codes.codes)
        self.register_buffer("scales", codes.scales.view(torch.int16))
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=codes.codes.device), persistent=False)

    def matrix(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """(rows, columns) in a type, by default the model's."""
        scales = self.scales.view(torch.float16).to(self.like.dtype if dtype is None else dtype)
        return dequantize(self.codes, scales, self.columns, self.bits, self.group)

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """(…, columns): some rows."""
        scales = self.scales[numbers].view(torch.float16).to(self.like.dtype)
        return dequantize(self.codes[numbers], scales, self.columns, self.bits, self.group)


class PackedLinear(nn.Module):
    """y = W x + b with packed W.

    Args:
        matrix: W (out, in); or the embedding whose matrix it shares, named `tied`, which is then kept there only.
        bias: (out,) or None.
    """

    def __init__(self, matrix: PackedMatrix, bias: torch.Tensor | None = None, tied: str = "") -> None:
        super().__init__()
        self.tied = tied
        self._shared = [matrix] if tied else []  # in a list: not a module of this one, hence not twice among tensors
        if not tied:
            self.packed = matrix
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.out_features, self.in_features = len(matrix.codes), matrix.columns

    @property
    def stored(self) -> PackedMatrix:
        """Where W is kept."""
        return self._shared[0] if self.tied else self.packed

    @property
    def weight(self) -> torch.Tensor:
        """W (out, in), computed."""
        return self.stored.matrix()

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        """(…, in) to (…, out)."""
        return functional.linear(activations, self.stored.matrix(activations.dtype), self._parameters["bias"])


class PackedEmbedding(nn.Module):
    """Rows of a packed matrix by number."""

    def __init__(self, matrix: PackedMatrix) -> None:
        super().__init__()
        self.packed = matrix

    @property
    def weight(self) -> torch.Tensor:
        """The table, computed."""
        return self.packed.matrix()

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """(…) integers to (…, columns)."""
        return self.packed.rows(numbers)


class PackedMPO(nn.Module):
    """An `MPOLinear` whose cores are packed: each as the matrix of its last axis longer than one.

    Args:
        layer: gives shapes and route; its numbers are not kept.
        packed: by the name of each core or tail of `layer`.
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
        self._layer = [layer.to(device="meta")]  # in a list: what it computes is wanted, not its tensors
        self.legs, self.bonds = layer.legs, layer.bonds
        self.out_features, self.in_features = layer.out_features, layer.in_features

    @property
    def weight(self) -> torch.Tensor:
        """The dense matrix (out, in), computed."""
        first = next(iter(self.packed.values()))
        assert isinstance(first, PackedMatrix)
        columns = torch.eye(self.in_features, dtype=first.like.dtype, device=first.codes.device)
        with torch.no_grad():
            result: torch.Tensor = self(columns)
            if self._parameters["bias"] is not None:
                result = result - self._parameters["bias"]
        return result.T.contiguous()

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        """(…, in) to (…, out)."""
        tensors = {name: getattr(self, name) for name in self._places}
        for name, matrix in self.packed.items():
            assert isinstance(matrix, PackedMatrix)
            tensors[name] = matrix.matrix(activations.dtype).reshape(self._shapes[name])
        if (bias := self._parameters["bias"]) is not None:
            tensors["bias"] = bias
        result: torch.Tensor = functional_call(self._layer[0], tensors, (activations,))
        return result

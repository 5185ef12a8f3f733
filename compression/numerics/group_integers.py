"""Quantizes matrices to integers of 2 to 8 bits, with one float16 scale per group of neighbours.

Takes tensors and returns tensors; does not know modules. A value is (code − 2^(bits−1)) · scale. This project packs
integers itself, and unpacks them with plain torch on any device, because torchao quantizes only `nn.Linear`, its int4
needs a GPU package, and MPO cores are not linear layers.

Rounding uses the moments of inputs and output gradients if they are given: scales minimise the error weighted by their
diagonals, and entries are rounded in their metric, see `compression.numerics.rounding`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from compression.numerics.finite import is_finite
from compression.numerics.packed_size import BITS
from compression.numerics.rounding import Triangle, nearest_plane
from compression.numerics.whitening import shrink
from compression.refusal import Refusal

__all__ = ["Codes", "Metric", "dequantize", "quantize"]

_SHRINK = (1.0, 0.92, 0.85, 0.78, 0.7)
"""Scales tried, relative to the one that reaches the largest entry; with 2 and 3 bits also `_SHRINK_MORE`."""
_SHRINK_MORE = (0.62, 0.54)
_SHRINKAGE = 0.3  # of the moment of gradients
_PIECE = 1 << 22  # entries whose scales are found at once


@dataclass(frozen=True, eq=False)
class Codes:
    """Holds a quantized (rows, columns) matrix.

    Attributes:
        codes: uint8 (rows, ⌈columns·bits/8⌉). A row is a sequence of bits, in which each code begins with its lowest
            bit, and each byte is filled from its lowest bit.
        scales: float16 (rows, ⌈columns/group⌉).
    """

    codes: torch.Tensor
    scales: torch.Tensor


class Metric:
    """The moments in whose metric a matrix is rounded; their factors are computed once for all bits.

    Args:
        inputs: C (in, in), positive semidefinite.
        gradients: G (out, out), or None for the metric of C alone. It is shrunk by 0.3 for rounding: errors that may
            go wherever G is small find where its estimate is too small. On search text of SmolLM2-135M, ten blocks in
            3 bits lost 0.109 nats with a shrinkage of 0.05, 0.103 with 0.2, 0.104 with 0.5 and 0.115 without G.
    """

    def __init__(self, inputs: torch.Tensor, gradients: torch.Tensor | None = None) -> None:
        self.inputs = Triangle.of(inputs)
        self.gradients = None if gradients is None else Triangle.of(shrink(gradients, _SHRINKAGE))
        self._columns = inputs.diagonal().float().clamp_min(0)
        self._rows = None if gradients is None else gradients.diagonal().float().clamp_min(0)

    def importance(self) -> torch.Tensor:
        """The weight of every entry's squared error, (out, in) or (1, in): products of the diagonals."""
        return self._columns[None] if self._rows is None else self._rows[:, None] * self._columns


@torch.no_grad()
def quantize(
    matrix: torch.Tensor, bits: int, group: int, metric: Metric | None = None, mask: torch.Tensor | None = None
) -> Codes:
    """Quantize a matrix, or some of its entries.

    Args:
        matrix: (rows, columns), finite.
        bits: bits per number, one of `BITS`.
        group: number of neighbours in a row that share a scale, at least 1. The last group of a row may be smaller.
        metric: the metric of rounding; None rounds to nearest.
        mask: the entries to store, bool (rows, columns). They are stored row by row as one row of the result.

    Raises:
        ValueError: `bits` or `group` is out of range, or the matrix is not finite.
    """
    if bits not in BITS or group < 1:
        raise Refusal(
            f"bits must be {', '.join(map(str, BITS[:-1]))} or {BITS[-1]} and group at least 1, got {bits} and {group}"
        )
    if not is_finite(matrix):
        raise Refusal("a matrix with NaN or infinite entries cannot be quantized")
    target = matrix.detach().float()
    importance = target.new_ones(1, 1) if metric is None else metric.importance().to(target.device)
    importance = importance.expand(len(target) if mask is not None else len(importance), target.shape[1])
    stored, weights = (target, importance) if mask is None else (target[mask][None], importance[mask][None])
    scales = _scales(stored, bits, group, weights)
    steps, half = scales.float().repeat_interleave(group, 1)[:, : stored.shape[1]], 1 << (bits - 1)
    if metric is None:
        codes = (stored / steps).round().clamp(-half, half - 1)
    else:
        everywhere = steps if mask is None else torch.ones_like(target).masked_scatter_(mask, steps)
        codes = nearest_plane(target, everywhere, -half, half - 1, metric.inputs, metric.gradients, mask)
        codes = codes if mask is None else codes[mask][None]
    return Codes(_pack((codes + half).to(torch.uint8), bits), scales)


def dequantize(codes: torch.Tensor, scales: torch.Tensor, columns: int, bits: int, group: int) -> torch.Tensor:
    """Returns the matrix (rows, columns) in the type of `scales`. `codes` and `scales` may be selected rows."""
    codes = _unpack(codes, bits)[..., :columns]
    whole = columns // group * group
    values = codes.to(scales.dtype) - (1 << (bits - 1))
    body = values[..., :whole].reshape(*values.shape[:-1], -1, group) * scales[..., : whole // group, None]
    if whole == columns:
        return body.flatten(-2)
    return torch.cat((body.flatten(-2), values[..., whole:] * scales[..., -1:]), -1)


def _scales(values: torch.Tensor, bits: int, group: int, importance: torch.Tensor) -> torch.Tensor:
    """Returns the scales (rows, groups), float16, of least weighted error. `importance` is (rows or 1, columns)."""
    space = -values.shape[1] % group
    grouped = functional.pad(values, (0, space)).view(len(values), -1, group)
    weights = functional.pad(importance, (0, space)).view(len(importance), -1, group)
    most = max(1, _PIECE // max(1, grouped.shape[1] * group))
    pieces = [
        _scale(grouped[at : at + most], bits, weights if len(weights) == 1 else weights[at : at + most])
        for at in range(0, len(grouped), most)
    ]
    return torch.cat(pieces).half()


def _scale(grouped: torch.Tensor, bits: int, weights: torch.Tensor) -> torch.Tensor:
    """Returns the scales (rows, groups) of grouped values (rows, groups, group). Their sign maps the largest entry to a
    negative code, which reaches one further than the positive codes."""
    half = 1 << (bits - 1)
    largest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))[..., 0]
    # Keep scales away from zero and within the range of float16.
    top = (-largest / half).half().float()
    top = torch.where(top.abs() < 1e-7, torch.full_like(top, 1e-7), top).half().float()
    best, chosen = torch.full_like(top, torch.inf), top
    shares = _SHRINK[:1] if bits > 6 else _SHRINK if bits > 3 else (*_SHRINK, *_SHRINK_MORE)
    for share in shares:
        scale = (top * share).half().float()
        scale = torch.where(scale == 0, top, scale)
        step = scale[..., None]
        error = (grouped / step).round_().clamp_(-half, half - 1).mul_(step).sub_(grouped)
        loss = (error.square_() * weights).sum(2)
        chosen, best = torch.where(loss < best, scale, chosen), torch.minimum(loss, best)
    return chosen


_CODES = {8: 1, 6: 4, 5: 8, 4: 2, 3: 8, 2: 4}
"""By bits, the fewest codes that fill whole bytes."""


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes (rows, columns), uint8, into the bytes that `Codes` describes."""
    if bits == 8:
        return codes.contiguous()
    together, columns = _CODES[bits], codes.shape[1]
    padded = functional.pad(codes, (0, -columns % together)).view(len(codes), -1, together).long()
    words = (padded << torch.arange(0, together * bits, bits, device=codes.device)).sum(2, keepdim=True)
    taken = words >> torch.arange(0, together * bits, 8, device=codes.device) & 255
    return taken.to(torch.uint8).flatten(1)[:, : -(-columns * bits // 8)].contiguous()


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns the codes (…, columns or more), uint8."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    together = _CODES[bits]
    size = together * bits // 8  # bytes
    padded = functional.pad(packed, (0, -packed.shape[-1] % size))
    kind = torch.int32 if together * bits <= 24 else torch.int64
    grouped = padded.view(*padded.shape[:-1], -1, size).to(kind)
    words = (grouped << torch.arange(0, 8 * size, 8, device=packed.device, dtype=kind)).sum(
        -1, keepdim=True, dtype=kind
    )
    shifts = torch.arange(0, together * bits, bits, device=packed.device, dtype=kind)
    return (words >> shifts & ((1 << bits) - 1)).to(torch.uint8).flatten(-2)

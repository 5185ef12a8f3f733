"""Quantizes matrices to integers of 8 or 4 bits, with one float16 scale per group of neighbours in a row.

Takes tensors and returns tensors; does not know modules. A value is (code − 2^(bits−1)) · scale. This project packs
integers itself, and unpacks them with plain torch on any device, because torchao quantizes only `nn.Linear`, its int4
needs a GPU package, and MPO cores are not linear layers.

Rounding uses the input moment C if it is given: scales minimise the error weighted by the diagonal of C, and the
columns not yet rounded compensate for the rounding error of each column (GPTQ, Frantar et al. 2022), which reduces
tr(E C Eᵀ).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compression.refusal import Refusal

__all__ = ["BITS", "Codes", "dequantize", "packed_bytes", "quantize"]

BITS = (8, 4)
_SHRINK = (1.0, 0.92, 0.85, 0.78, 0.7)  # scales tried, relative to the one that reaches the largest entry
_DAMPING = 0.01  # added to the diagonal of C, relative to its mean


@dataclass(frozen=True, eq=False)
class Codes:
    """Holds a quantized (rows, columns) matrix.

    Attributes:
        codes: uint8 (rows, ⌈columns·bits/8⌉). With 4 bits, the low half of a byte holds the even column.
        scales: float16 (rows, ⌈columns/group⌉).
    """

    codes: torch.Tensor
    scales: torch.Tensor


def packed_bytes(rows: int, columns: int, bits: int, group: int) -> int:
    """Returns the bytes of the codes and scales of a quantized (rows, columns) matrix."""
    return rows * (-(-columns * bits // 8) + 2 * -(-columns // group))


def quantize(matrix: torch.Tensor, bits: int, group: int, moment: torch.Tensor | None = None) -> Codes:
    """Quantize a matrix.

    Args:
        matrix: (rows, columns), finite.
        bits: bits per number, 8 or 4.
        group: number of neighbours in a row that share a scale, at least 1. The last group of a row may be smaller.
        moment: second moment C (columns, columns) of the inputs of the matrix; None rounds to nearest.

    Raises:
        ValueError: `bits` or `group` is out of range, or the matrix is not finite.
    """
    if bits not in BITS or group < 1:
        raise Refusal(f"bits must be 8 or 4 and group at least 1, got {bits} and {group}")
    if not torch.isfinite(matrix).all():
        raise Refusal("a matrix with NaN or infinite entries cannot be quantized")
    rest = matrix.detach().float().clone()
    columns = rest.shape[1]
    importance = torch.ones(columns, device=rest.device) if moment is None else moment.diagonal().float().clamp_min(0)
    upper = None if moment is None else _feedback(moment.to(rest.device))
    codes, scales = [], []
    for start in range(0, columns, group):
        part = rest[:, start : start + group]
        scale = _scale(part, bits, importance[start : start + group])
        scales.append(scale.half())
        step = scales[-1].float()
        if upper is None:
            codes.append(_round(part, step[:, None], bits))
            continue
        errors = torch.empty_like(part)
        for offset in range(part.shape[1]):
            column = start + offset
            code = _round(part[:, offset], step, bits)
            codes.append(code[:, None])
            error = (part[:, offset] - _values(code, step, bits)) / upper[column, column]
            part[:, offset:] -= torch.outer(error, upper[column, column : start + part.shape[1]])
            errors[:, offset] = error
        stop = start + part.shape[1]
        rest[:, stop:] -= errors @ upper[start:stop, stop:]
    return Codes(_pack(torch.cat(codes, 1), bits), torch.stack(scales, 1))


def dequantize(codes: torch.Tensor, scales: torch.Tensor, columns: int, bits: int, group: int) -> torch.Tensor:
    """Returns the matrix (rows, columns) in the type of `scales`. `codes` and `scales` may be selected rows."""
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)[..., :columns]
    whole = columns // group * group
    values = codes.to(scales.dtype) - (1 << (bits - 1))
    body = values[..., :whole].reshape(*values.shape[:-1], -1, group) * scales[..., : whole // group, None]
    if whole == columns:
        return body.flatten(-2)
    return torch.cat((body.flatten(-2), values[..., whole:] * scales[..., -1:]), -1)


def _round(values: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    half = 1 << (bits - 1)
    return (values / scale).round().clamp(-half, half - 1).add(half).to(torch.uint8)


def _values(codes: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    return (codes.float() - (1 << (bits - 1))) * scale


def _scale(part: torch.Tensor, bits: int, importance: torch.Tensor) -> torch.Tensor:
    """Returns the scales (rows,) of least weighted error. Their sign maps the largest entry to a negative code, which
    reaches one further than the positive codes."""
    largest = part.gather(1, part.abs().argmax(1, keepdim=True))[:, 0]
    # Keep scales away from zero and within the range of float16.
    top = (-largest / (1 << (bits - 1))).half().float()
    top = torch.where(top.abs() < 1e-7, torch.full_like(top, 1e-7), top).half().float()
    best, chosen = torch.full_like(top, torch.inf), top
    for share in _SHRINK if bits < 8 else _SHRINK[:1]:
        scale = (top * share).half().float()
        scale = torch.where(scale == 0, top, scale)
        error = _values(_round(part, scale[:, None], bits), scale[:, None], bits) - part
        loss = (error.square() * importance).sum(1)
        chosen, best = torch.where(loss < best, scale, chosen), torch.minimum(loss, best)
    return chosen


def _feedback(moment: torch.Tensor) -> torch.Tensor:
    """Returns the upper Cholesky factor of C⁻¹, float32. Row k states how later columns compensate for column k."""
    damped = moment.double().clone()
    mean = damped.diagonal().mean().clamp_min(1e-12)
    damped.diagonal().add_(_DAMPING * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return codes.contiguous()
    if codes.shape[1] % 2:
        codes = torch.cat((codes, codes.new_zeros(len(codes), 1)), 1)
    return codes[:, ::2] | (codes[:, 1::2] << 4)

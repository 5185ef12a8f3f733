"""Multiplies matrices with results in float32, as fast as the numbers that they hold allow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["float32_pieces", "float32_product", "products_of", "rounds_products"]

_PIECE = 4096


def rounds_products(matrix: torch.Tensor) -> bool:
    """Whether this is a matrix of 16-bit numbers on a CPU.

    Its products are rounded to 16 bits there, and a kernel is compiled for every shape of the rows.
    """
    return matrix.device.type == "cpu" and matrix.dtype in (torch.bfloat16, torch.float16)


@contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """Lets a CPU round the factors of float32 products to bfloat16 if they come from such numbers; sums stay float32.

    Numbers that were bfloat16 before do not change, so that their products are exact. A processor that multiplies
    bfloat16 is about three times as fast with it; others compute as before.

    Args:
        dtype: type of the numbers before they became float32.
    """
    if dtype != torch.bfloat16:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def float32_product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns rows · weightᵀ (n, out) in float32, whatever the numbers of `weight`; without gradients.

    PyTorch rounds the products of 16-bit numbers on a CPU to 16 bits: a logit of 20 in bfloat16 to the nearest eighth.

    Args:
        rows: (n, in), of the type of `weight` or rounded to it.
        weight: (out, in), on a CPU.
    """
    given = rows.to(weight.dtype).float()
    result = given.new_empty(len(given), len(weight))
    with torch.no_grad(), products_of(weight.dtype), torch.autocast("cpu", enabled=False):
        for start, piece in float32_pieces(weight):
            result[:, start : start + len(piece)] = torch.mm(given, piece.T)
    return result


def float32_pieces(weight: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields the rows of a matrix in float32, a few thousand at a time, each time after the number of the first one.

    That of a head with 152,000 tokens would take half a gigabyte.
    """
    size = len(weight) if weight.dtype == torch.float32 else _PIECE
    for start in range(0, len(weight), size):
        yield start, weight[start : start + size].float()

"""Computes y = P [I; T] B x, the product with a matrix whose left factor contains an identity, by copying those rows.

Takes tensors and returns tensors. T is (out − χ, χ), B is (χ, in), and P permutes the rows; the product takes
χ·(in + out − χ) multiply-adds per token. The permutation costs memory traffic and no arithmetic, and memory traffic
limits a CPU. Without gradients, the unordered rows are therefore computed piece by piece in a reused scratch buffer,
which stays mapped and in the CPU cache.
"""

from __future__ import annotations

import threading

import torch
from torch.nn.functional import linear

__all__ = ["ALIGNED", "padded", "pivoted_product", "row_order", "unfolding"]

ALIGNED = 16
"""Float32 entries per cache line. Matrix products are up to a sixth slower if rows do not start on cache lines."""

_FEW = 32  # number of tokens from which the scratch buffer pays
_PIECE = {True: 512, False: 2048}  # best number of tokens per piece, for transposed and for plain products
_scratch = threading.local()


def padded(entries: int) -> int:
    """Returns `entries` rounded up to whole cache lines of float32."""
    return -(-entries // ALIGNED) * ALIGNED


def row_order(places: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the positions of the rows of P [I; T] in two layouts, int64 (rows,) each.

    The first are positions in [I; T]. The second are positions in [I; padding; T], where the padding rounds χ up to a
    multiple of 16.

    Args:
        places: (χ,) integers, the row of the result that each row of I becomes. The rows of T fill the other rows in
            ascending order.
        rows: number of rows of the result.
    """
    chosen, chi = places.long(), len(places)
    rest = torch.ones(rows, dtype=torch.int64, device=places.device).index_fill(0, chosen, 0)
    below = rest.cumsum(0) - 1
    identity = torch.arange(chi, device=places.device)
    return (below + chi).index_copy(0, chosen, identity), (below + padded(chi)).index_copy(0, chosen, identity)


def unfolding(tail: torch.Tensor, order: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Returns P [I; T], (rows, χ); `order` comes from `row_order`."""
    identity = torch.eye(tail.shape[1], dtype=tail.dtype, device=tail.device)
    return torch.cat((identity, tail)).index_select(0, order[0])


def pivoted_product(
    activations: torch.Tensor,
    last: torch.Tensor,
    tail: torch.Tensor,
    order: tuple[torch.Tensor, torch.Tensor],
    transposed: bool,
) -> torch.Tensor:
    """Maps activations (…, in) to outputs (…, out).

    Args:
        activations: x, (…, in).
        last: B, (χ, in).
        tail: T, (out − χ, χ).
        order: result of `row_order`.
        transposed: whether intermediate results are stored output by output instead of token by token. The layout of
            the result is the same.
    """
    tokens, inputs = activations.numel() // last.shape[1], last.shape[1]
    # A single token passes about 200 layers in sequence, so every operation and every check here counts.
    if tokens == 1 and activations.dtype == last.dtype:
        copied = torch.mv(last, activations.reshape(-1))
        result = torch.cat((copied, torch.mv(tail, copied))).index_select(0, order[0])
        return result.view(*activations.shape[:-1], len(result))
    if tokens >= _FEW and _in_place(activations, last, tail):
        result = _by_pieces(activations.reshape(tokens, inputs), last, tail, order[1], transposed)
        return result.reshape(*activations.shape[:-1], result.shape[1])
    if transposed:
        copied = torch.mm(last, activations.reshape(tokens, inputs).t())
        unordered = torch.cat((copied, torch.mm(tail, copied))).t()
        unordered = unordered.reshape(*activations.shape[:-1], unordered.shape[1])
    else:
        copied = linear(activations, last)
        unordered = torch.cat((copied, linear(copied, tail)), dim=-1)
    # Not index_select: its gradient takes four times as long.
    return unordered.gather(-1, order[0].expand(*unordered.shape[:-1], -1))


def _by_pieces(
    activations: torch.Tensor, last: torch.Tensor, tail: torch.Tensor, order: torch.Tensor, transposed: bool
) -> torch.Tensor:
    chi, tokens = len(last), len(activations)
    below = padded(chi)
    result = activations.new_empty(tokens, len(order))
    width, piece = below + padded(len(tail)), min(tokens, _PIECE[transposed])
    # An odd number of cache lines per row distributes the entries of a column over all cache sets.
    stride = padded(piece) | ALIGNED if transposed else width
    buffer = _buffer(width * stride if transposed else piece * stride, activations)
    for start in range(0, tokens, piece):
        part = activations[start : start + piece]
        shape = (width, len(part)) if transposed else (len(part), width)
        unordered = buffer.as_strided(shape, (stride, 1))
        if transposed:
            copied = unordered[:chi]
            torch.mm(last, part.t(), out=copied)
            torch.mm(tail, copied, out=unordered[below : below + len(tail)])
            unordered = unordered.t()
        else:
            copied = unordered[:, :chi]
            torch.mm(part, last.t(), out=copied)
            torch.mm(copied, tail.t(), out=unordered[:, below : below + len(tail)])
        torch.gather(unordered, 1, order.expand(len(part), -1), out=result[start : start + piece])
    return result


def _in_place(activations: torch.Tensor, last: torch.Tensor, tail: torch.Tensor) -> bool:
    """Whether these are plain CPU tensors of 32 or 64 bits, multiplied eagerly and without gradients.

    A product of bfloat16 on AMX reads rows of 419 entries up to the 448th and multiplies what it finds there by 0: NaN
    where the scratch buffer was never written.
    """
    return (
        not torch.compiler.is_compiling()
        and type(activations) is torch.Tensor
        and activations.device.type == "cpu"
        and activations.dtype == last.dtype == tail.dtype
        and activations.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (activations.requires_grad or last.requires_grad or tail.requires_grad))
    )


def _buffer(entries: int, like: torch.Tensor) -> torch.Tensor:
    """Returns this thread's scratch buffer with at least `entries` entries; its contents are undefined."""
    buffer: torch.Tensor | None = getattr(_scratch, str(like.dtype), None)
    if buffer is None or len(buffer) < entries:
        with torch.inference_mode(False):
            buffer = torch.empty(entries, dtype=like.dtype)
        setattr(_scratch, str(like.dtype), buffer)
    return buffer

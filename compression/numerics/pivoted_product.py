"""y = P [I; T] B x: the product with a matrix whose left factor holds an identity, which is copied instead of computed.

Tensors in, tensors out. T is (out − χ, χ), B is (χ, in), and P puts the rows in order: χ·(in + out − χ) multiply-adds
per token. Putting in order costs no arithmetic but memory traffic, and on a CPU that decides: without gradients the
unordered rows are therefore computed in place, piece by piece, in a scratch buffer that stays mapped and cached.
"""

from __future__ import annotations

import threading

import torch
from torch.nn.functional import linear

__all__ = ["ALIGNED", "padded", "pivoted_product", "row_order", "unfolding"]

ALIGNED = 16
"""Entries: matrix products are up to a sixth slower where rows of float32 do not start on cache lines."""

_FEW = 32  # tokens
_PIECE = {True: 512, False: 2048}  # tokens, of transposed and of plain products: each as many as pay
_scratch = threading.local()


def padded(entries: int) -> int:
    """Rounded up to whole cache lines of float32."""
    return -(-entries // ALIGNED) * ALIGNED


def row_order(places: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row of P [I; T] is, int64 (rows,): in [I; T] as it stands, and with χ rounded up to 16 before T.

    Args:
        places: (χ,) integers, the row that each row of I becomes; the rows of T fill the others in ascending order.
    """
    chosen, chi = places.long(), len(places)
    rest = torch.ones(rows, dtype=torch.int64, device=places.device).index_fill(0, chosen, 0)
    below = rest.cumsum(0) - 1
    identity = torch.arange(chi, device=places.device)
    return (below + chi).index_copy(0, chosen, identity), (below + padded(chi)).index_copy(0, chosen, identity)


def unfolding(tail: torch.Tensor, order: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """P [I; T], (rows, χ)."""
    identity = torch.eye(tail.shape[1], dtype=tail.dtype, device=tail.device)
    return torch.cat((identity, tail)).index_select(0, order[0])


def pivoted_product(
    activations: torch.Tensor,
    last: torch.Tensor,
    tail: torch.Tensor,
    order: tuple[torch.Tensor, torch.Tensor],
    transposed: bool,
) -> torch.Tensor:
    """(…, in) to (…, out).

    Args:
        last: B.
        tail: T.
        order: from `row_order`.
        transposed: compute with one output after the other in memory instead of one token after the other. The result
            is laid out the same.
    """
    tokens, inputs = activations.numel() // last.shape[1], last.shape[1]
    # One token meets 200 layers one after the other: each operation that is not made, and each question, counts.
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
    # Not index_select: the gradient of that takes four times as long.
    return unordered.gather(-1, order[0].expand(*unordered.shape[:-1], -1))


def _by_pieces(
    activations: torch.Tensor, last: torch.Tensor, tail: torch.Tensor, order: torch.Tensor, transposed: bool
) -> torch.Tensor:
    chi, tokens = len(last), len(activations)
    below = padded(chi)
    result = activations.new_empty(tokens, len(order))
    width, piece = below + padded(len(tail)), min(tokens, _PIECE[transposed])
    # An odd number of cache lines from row to row, so that a column does not fall into a few cache sets only.
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
    """Whether plain CPU tensors are multiplied here and now, without a graph of gradients or of a compiler."""
    return (
        not torch.compiler.is_compiling()
        and type(activations) is torch.Tensor
        and activations.device.type == "cpu"
        and activations.dtype == last.dtype == tail.dtype
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (activations.requires_grad or last.requires_grad or tail.requires_grad))
    )


def _buffer(entries: int, like: torch.Tensor) -> torch.Tensor:
    """Scratch of this thread, at least that many entries; contents undefined."""
    buffer: torch.Tensor | None = getattr(_scratch, str(like.dtype), None)
    if buffer is None or len(buffer) < entries:
        with torch.inference_mode(False):
            buffer = torch.empty(entries, dtype=like.dtype)
        setattr(_scratch, str(like.dtype), buffer)
    return buffer

"""Measures how long a model takes per token. Knows models; does not know data."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from compression.bonds import one_of_a_kind
from compression.calibration.blocks import record_blocks
from compression.sites import first_of_kind

__all__ = ["seconds_per_token", "seconds_per_token_by_parts"]

_SHORTER = 2  # a large model is timed on a row with one in so many of the tokens
_SHARE = 8  # the output head is timed with one of this many of its rows


@torch.inference_mode()
def seconds_per_token(model: Any, tokens: int) -> float:
    """Seconds per token of a forward pass, measured now on two rows of `tokens` tokens."""
    ids = torch.ones(2, tokens, dtype=torch.long, device=model.device)
    return _fastest(lambda: model(ids, use_cache=False).logits) / ids.numel()


@torch.inference_mode()
def seconds_per_token_by_parts(model: Any, tokens: int) -> float:
    """The same for a large model: one block of each kind is timed on a shorter row, and a part of the head."""
    prefix, like = first_of_kind(model)
    tokens = max(1, tokens // _SHORTER)
    ids = torch.ones(1, tokens, dtype=torch.long, device=model.device)
    alike = Counter(like)
    with one_of_a_kind(model, prefix, like):
        names = [f"{prefix}.{first}" for first in alike]
        blocks, [hidden] = record_blocks(model, names, [(ids, torch.ones_like(ids, dtype=torch.bool))])
    total = 0.0
    for block, count in zip(blocks, alike.values(), strict=True):
        total += count * _fastest(partial(block.forward, 0, hidden))
    head = model.get_output_embeddings()
    if head is not None:
        rows = head.weight[: max(1, len(head.weight) // _SHARE)]
        states = hidden.to(rows.dtype)
        total += len(head.weight) / len(rows) * _fastest(lambda: states @ rows.T)
    return total / tokens


def _fastest(run: Callable[[], torch.Tensor]) -> float:
    """The shorter time of two runs in seconds; reading a number of the result waits for a GPU."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        float(run().flatten()[0])
        times.append(time.perf_counter() - start)
    return min(times)

"""Finds the two ends of a language model, token embedding and output head; what the head reads; and rounds both.

Knows models of transformers; does not know sites or schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from compression.calibration.blocks import Batch
from compression.layers.quantize import quantized
from compression.numerics.packed_size import GROUP, SCALE, packed_bytes
from compression.training.trainable import captured_head_input
from search.config import BYTES

__all__ = ["ends", "head_moment", "reads_head_input", "rounded_ends", "rounding_saves"]


def ends(model: Any) -> list[str]:
    """Return the names of the token embedding and the output head, as far as they can be rounded.

    An end that computes more than a lookup or a product, such as the embedding of Gemma 3, which multiplies what it
    looks up, cannot; nor can one that shares its matrix with such an end.
    """
    wanted = [model.get_input_embeddings(), model.get_output_embeddings()]
    found = [each for each in wanted if isinstance(each, nn.Embedding | nn.Linear)]  # others are rounded already
    plain = (nn.Embedding.forward, nn.Linear.forward)
    kept = {id(each.weight) for each in found if type(each).forward not in plain}
    chosen = {id(each) for each in found if id(each.weight) not in kept}
    return [name for name, module in model.named_modules() if id(module) in chosen]


def reads_head_input(model: Any, name: str) -> bool:
    """Whether the matrix of one of the ends is multiplied with the last hidden states: a head, or a shared matrix."""
    head = model.get_output_embeddings()
    return head is not None and model.get_submodule(name).weight is head.weight


@torch.no_grad()
def head_moment(model: Any, batches: Sequence[Batch]) -> torch.Tensor:
    """Returns the second moment E[h hᵀ] (width, width), float64, of what the output head reads on `batches`.

    Args:
        batches: (input_ids, mask) pairs; tokens with mask 0 do not count. At least one counts.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    device = next(model.parameters()).device
    for ids, mask in batches:
        with captured_head_input(model) as caught:
            model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        hidden = caught[0][mask.bool().to(caught[0].device)].float()
        total, count = total.to(hidden.device) + (hidden.T @ hidden).double(), count + len(hidden)
    return total / count


def rounded_ends(model: Any, bits: int, moment: torch.Tensor | None, group: int = GROUP) -> dict[str, nn.Module]:
    """Returns modules that store the ends in `bits` bits a number, by name; the model does not change.

    Args:
        bits: see `compression.numerics.packed_size.BITS`.
        moment: what `head_moment` returns, in whose metric a matrix of the head is rounded; None rounds to nearest.
    """
    names, known = dict.fromkeys(ends(model), bits), None if moment is None else (moment, None)
    return dict(quantized(model, names, lambda name: known if reads_head_input(model, name) else None, group))


def rounding_saves(model: Any, bits: int, group: int = GROUP, scale: int = SCALE) -> int:
    """Returns the bytes that `rounded_ends` saves where a number takes 2 bytes and a scale so many."""
    tables = {
        id(weight): weight.shape for name in ends(model) if (weight := model.get_submodule(name).weight) is not None
    }
    return sum(
        rows * columns * BYTES - packed_bytes(rows, columns, bits, group, scale) for rows, columns in tables.values()
    )

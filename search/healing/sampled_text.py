"""Text that the dense model writes itself."""

from __future__ import annotations

from typing import Any

import torch

from search.healing.rows import HealingText
from search.model.loading import LoadedModel

__all__ = ["sampled_rows"]

_SAMPLED_TOKENS = 100_000
_SAMPLED_AT_ONCE = 64  # rows; many more on a GPU, where a step takes as long for one row as for a thousand
_MOST_AT_ONCE = 8192
_BEGINNING = 16  # tokens of other text that sampled text goes on from


def sampled_rows(
    loaded: LoadedModel, length: int, seed: int, tokens: int, given: torch.Tensor | None = None
) -> HealingText:
    """What a model itself writes at temperature 1.

    Args:
        given: rows (n, length) that beginnings are cut out of; without it rows begin with one random token.
    """
    model, rows = loaded.model, -(-tokens // length)
    done: list[torch.Tensor] = []
    device = model.device
    most = _rows_at_once(model, length)
    most = -(-rows // -(-rows // most))  # equally many each time: few rows take as long as many
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(seed)
        while (missing := rows - sum(map(len, done))) > 0:
            first = _beginnings(given, model.config.vocab_size, min(missing, most)).to(device)
            done.append(
                model.generate(
                    first,
                    attention_mask=torch.ones_like(first),
                    do_sample=True,
                    top_k=0,
                    top_p=1.0,
                    temperature=1.0,
                    repetition_penalty=1.0,
                    min_length=length,
                    max_length=length,
                    pad_token_id=0,
                ).cpu()
            )
    written = torch.cat(done).to(torch.int32)
    wanted = torch.ones_like(written, dtype=torch.bool)
    wanted[:, -1] = False
    return HealingText(written, wanted, "sampled")


def _beginnings(given: torch.Tensor | None, vocabulary: int, count: int) -> torch.Tensor:
    """Token ids (count, 16 or fewer) out of random places of `given`, or (count, 1) at random."""
    if given is None:
        return torch.randint(vocabulary, (count, 1))
    size = min(_BEGINNING, given.shape[1] - 1)
    rows, starts = torch.randint(len(given), (count, 1)), torch.randint(given.shape[1] - size + 1, (count, 1))
    return given[rows, starts + torch.arange(size)].long()


def _rows_at_once(model: Any, length: int) -> int:
    """On a GPU those whose keys, values and logits fill half of its free memory."""
    if model.device.type != "cuda":
        return _SAMPLED_AT_ONCE
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    bytes_a_row = length * config.num_hidden_layers * 2 * heads * head * model.dtype.itemsize + 16 * config.vocab_size
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(1, min(_MOST_AT_ONCE, int(free // 2 // bytes_a_row)))

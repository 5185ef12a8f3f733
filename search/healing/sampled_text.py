"""Sample text from the dense model, to heal with when other text is missing or used up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from search.healing.rows import HealingText
from search.model.loading import LoadedModel

__all__ = ["SAMPLED_TOKENS", "sampled_rows"]

SAMPLED_TOKENS = 100_000
_SAMPLED_AT_ONCE = 64  # rows on a CPU; a GPU takes as long for a thousand rows as for one, see `_rows_at_once`
_MOST_AT_ONCE = 8192
_BEGINNING = 16  # tokens of other text that a sampled row continues


def sampled_rows(
    loaded: LoadedModel, length: int, seed: int, tokens: int, given: torch.Tensor | None = None
) -> HealingText:
    """Sample rows of `length` tokens from a model at temperature 1.

    Args:
        tokens: sample at least this many tokens in all.
        given: rows of other text (n, length). Each sampled row continues a random piece of them. Without `given`, it
            continues the special tokens that start a text, or one random token if the tokenizer has none.
    """
    loaded.must_continue_text("sampled text")
    model, rows, begin = loaded.model, -(-tokens // length), loaded.beginning
    done: list[torch.Tensor] = []
    device = model.device
    most = _rows_at_once(model, length)
    most = -(-rows // -(-rows // most))  # batches of equal size: a small last batch would take as long as a full one
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(seed)
        while (missing := rows - sum(map(len, done))) > 0:
            first = _first_tokens(given, begin, model.config.get_text_config().vocab_size, min(missing, most)).to(
                device
            )
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


def _first_tokens(given: torch.Tensor | None, begin: Sequence[int], vocabulary: int, count: int) -> torch.Tensor:
    """The tokens (count, few) that sampled rows continue: `begin`, then up to 16 from a random place of `given`.

    Without either, they are random tokens (count, 1).
    """
    begins = torch.tensor(begin, dtype=torch.long).expand(count, -1)
    if given is None:
        return begins if begin else torch.randint(vocabulary, (count, 1))
    text = given[:, len(begin) :]
    size = min(_BEGINNING, text.shape[1] - 1)
    rows, starts = torch.randint(len(text), (count, 1)), torch.randint(text.shape[1] - size + 1, (count, 1))
    return torch.cat([begins, text[rows, starts + torch.arange(size)].long()], dim=1)


def _rows_at_once(model: Any, length: int) -> int:
    """Rows per batch: on a GPU, as many as fill half of its free memory with keys, values and logits."""
    if model.device.type != "cuda":
        return _SAMPLED_AT_ONCE
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    bytes_a_row = length * config.num_hidden_layers * 2 * heads * head * model.dtype.itemsize + 16 * config.vocab_size
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(1, min(_MOST_AT_ONCE, int(free // 2 // bytes_a_row)))

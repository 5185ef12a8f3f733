"""Generate greedily for many prompts that share one row of a KV cache.

Knows a causal language model with a KV cache; does not know lm-eval or tasks. The prefix that all prompts share comes
first in the cache and is computed, stored and read once. The rest of each prompt follows side by side, masked so that
no prompt attends to another. When a prompt is complete, the next one takes its place (continuous batching).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from compression.refusal import Refusal
from search.evaluation.logits import read
from search.evaluation.shared_rows import shares_rows
from search.model.kv_cache import keep_positions, new_cache

__all__ = ["NonFinite", "generate"]

_PASS_TOKENS = 2048  # most tokens in one forward pass, unless a single prompt is longer
_ROW_PROMPTS = 32  # most prompts active at a time
_WANTED = 0.8  # the cache is compacted when less than this share of it belongs to active prompts or the shared prefix


class NonFinite(ArithmeticError):
    """A model gave a NaN or infinite logit, so there is no likeliest token."""


@dataclass
class _Prompt:
    """One prompt and its continuation.

    Attributes:
        number: index among all prompts.
        tokens: tokens of the prompt after the shared prefix.
        written: tokens generated so far.
    """

    number: int
    tokens: list[int]
    written: list[int] = field(default_factory=list)


@torch.inference_mode()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    most: int,
    ended: Callable[[list[int]], bool],
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """Continue every prompt with the likeliest token, step by step; returns the continuations in order.

    A model in which prompts cannot share a row processes them one at a time: its caches drop old positions, or the test
    of `search.evaluation.shared_rows` fails.

    Args:
        prompts: token sequences, none empty.
        most: most tokens to generate for each prompt, at least 1.
        ended: called after every token with the continuation so far; returns whether it is complete.
        progress: called with the number of prompts completed since the last call.

    Raises:
        NonFinite: a logit is NaN or infinite.
        ValueError: a prompt is empty.
    """
    if not all(prompts):
        raise Refusal("a prompt must have at least one token")
    longest = max(prompts, key=len, default=())
    alone = bool(prompts) and (any(new_cache(model).is_sliding) or not shares_rows(model, longest))
    shared = 0 if alone else _shared(prompts)
    waiting = [_Prompt(number, list(tokens[shared:])) for number, tokens in enumerate(prompts)]
    for row in [[one] for one in waiting] if alone else [waiting]:
        cache = new_cache(model)
        if shared:
            _append(model, cache, torch.tensor(prompts[0][:shared]), torch.arange(shared), None)
        _fill(model, cache, shared, row, most, ended, progress, masked=not alone)
    return [prompt.written for prompt in waiting]


def _fill(
    model: nn.Module,
    cache: Any,
    shared: int,
    prompts: Sequence[_Prompt],
    most: int,
    ended: Callable[[list[int]], bool],
    progress: Callable[[int], None],
    masked: bool,
) -> None:
    """Generate for all prompts in one row; when one is complete, the next takes its place."""
    waiting = sorted(prompts, key=lambda prompt: len(prompt.tokens))
    fed = {prompt.number: prompt.tokens for prompt in prompts}
    lengths = dict.fromkeys(fed, shared)
    owners = torch.full((shared,), -1)
    active: list[_Prompt] = []
    while active or waiting:
        _admit(active, waiting, fed)
        ids = torch.tensor([token for prompt in active for token in fed[prompt.number]])
        own = torch.tensor([prompt.number for prompt in active for _ in fed[prompt.number]])
        positions = torch.cat([lengths[one.number] + torch.arange(len(fed[one.number])) for one in active])
        visible = _visible(owners, own) if masked else None
        ends = torch.tensor([len(fed[prompt.number]) for prompt in active]).cumsum(0) - 1
        logits = _append(model, cache, ids, positions, visible, ends)
        if not torch.isfinite(logits).all():
            raise NonFinite("the model gives NaN or infinite logits")
        owners = torch.cat([owners, own])
        for prompt, token in zip(active, logits.argmax(-1).tolist(), strict=True):
            lengths[prompt.number] += len(fed[prompt.number])
            prompt.written.append(token)
            fed[prompt.number] = [token]
        before = len(active)
        active = [one for one in active if len(one.written) < most and not ended(one.written)]
        if len(active) < before:
            progress(before - len(active))
        wanted = torch.isin(owners, torch.tensor([-1, *(one.number for one in active)]))
        if masked and int(wanted.sum()) < _WANTED * len(owners):
            keep_positions(cache, wanted.nonzero().squeeze(-1).to(next(model.parameters()).device))
            owners = owners[wanted]


def _admit(active: list[_Prompt], waiting: list[_Prompt], fed: Mapping[int, Sequence[int]]) -> None:
    """Activate the longest waiting prompts, as many as fit into one pass, and at least one if none is active."""
    room = _PASS_TOKENS - sum(len(fed[prompt.number]) for prompt in active)
    while waiting and (not active or (len(active) < _ROW_PROMPTS and len(waiting[-1].tokens) <= room)):
        active.append(waiting.pop())
        room -= len(active[-1].tokens)


def _append(
    model: nn.Module,
    cache: Any,
    ids: torch.Tensor,
    positions: torch.Tensor,
    visible: torch.Tensor | None,
    source: torch.Tensor | None = None,
) -> torch.Tensor:
    """Feed tokens that follow those in the cache; returns the logits at the positions `source`, by default the last."""
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {"input_ids": ids[None].to(device)}
    if visible is not None:
        inputs |= {"position_ids": positions[None].to(device), "attention_mask": visible[None, None].to(device)}
    source = torch.tensor([len(ids) - 1]) if source is None else source
    return read(model, inputs, source.to(device), cache).logits


def _visible(before: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Attention mask (new, before + new): a token sees the shared prefix and its own prompt up to itself.

    Args:
        before: number of the prompt that each cached position belongs to (before,), -1 for the shared prefix.
        own: number of the prompt that each new token belongs to (new,).
    """
    past = (before < 0) | (before == own[:, None])
    new = (own == own[:, None]).tril()
    return torch.cat([past, new], dim=1)


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the prefix that all prompts share, such that at least one token of each prompt follows it."""
    if len(prompts) < 2:
        return 0
    ordered = sorted(map(tuple, prompts))
    first, last = ordered[0], ordered[-1]  # in lexicographic order, all others lie between these two
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    return min(common, min(map(len, prompts)) - 1)

"""Greedy generation: the likeliest next token, again and again, for many prompts in one row.

Knows a causal language model with a cache of keys and values; nothing of lm-eval or of tasks. Prompts lie in the cache
side by side, behind the beginning that they share, and none sees another: what they share is computed, stored and read
once. Where a prompt ends, the next takes its place, so that the passes of a long answer are shared by others.
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
from search.model.kv_cache import keep_positions, new_cache

__all__ = ["NonFinite", "generate"]

_PASS_TOKENS = 2048  # fed in one pass, unless one prompt alone is longer
_ROW_PROMPTS = 32  # side by side at a time
_WANTED = 0.8  # a cache is packed anew where less than this share of it is still looked at


class NonFinite(ArithmeticError):
    """A model gave a NaN or infinite logit; there is no likeliest token."""


@dataclass
class _Prompt:
    """A prompt in a row.

    Attributes:
        number: its place among all prompts.
        tokens: without what all share.
        written: what was generated.
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
    """The likeliest continuation of every prompt, token by token; in order.

    Models with sliding-window layers take one prompt after the other, since their caches forget.

    Args:
        prompts: token sequences, none empty.
        most: tokens generated for each, at most; at least 1.
        ended: whether a continuation is complete, asked after every token.
        progress: told how many prompts have ended.

    Raises:
        NonFinite: a logit is NaN or infinite.
        ValueError: an empty prompt.
    """
    if not all(prompts):
        raise Refusal("a prompt must have at least one token")
    alone = any(new_cache(model).is_sliding)
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
    """Generate for all prompts in one row: where one ends, the next takes its place."""
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
    """Let the longest waiting prompts in, as many as one pass takes; at least one where none is active."""
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
    """Feed tokens behind those in the cache; logits at `source`, by default the last."""
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {"input_ids": ids[None].to(device), "position_ids": positions[None].to(device)}
    if visible is not None:
        inputs["attention_mask"] = visible[None, None].to(device)
    source = torch.tensor([len(ids) - 1]) if source is None else source
    return read(model, inputs, source.to(device), cache).logits


def _visible(before: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """What each new token sees, (new, before + new): the shared beginning, and of its own prompt what is not later."""
    past = (before < 0) | (before == own[:, None])
    new = (own == own[:, None]).tril()
    return torch.cat([past, new], dim=1)


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the beginning that all prompts have in common, leaving every one at least a token."""
    if len(prompts) < 2:
        return 0
    ordered = sorted(map(tuple, prompts))
    first, last = ordered[0], ordered[-1]  # in the order of words, all others lie between
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    return min(common, min(map(len, prompts)) - 1)

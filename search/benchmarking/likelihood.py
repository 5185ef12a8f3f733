"""Likelihoods: how probable a model finds continuations of contexts, those of one context in one pass.

Knows a causal language model and tokens; nothing of lm-eval or of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from search.evaluation.packed_sequences import Packed, packed_item
from search.evaluation.workload import Continuation, Workload

__all__ = ["continuations", "text_likelihoods"]

Encode = Callable[[str], list[int]]
Progress = Callable[[int], None]

_CHUNK = 256  # sequences between two reports of progress


def continuations(
    model: nn.Module,
    encode: Encode,
    pairs: Sequence[tuple[str, str]],
    limit: int,
    begin: int,
    batch_tokens: int,
    progress: Progress = lambda done: None,
) -> list[Continuation]:
    """What a model says of pairs of context and continuation, in order.

    Pairs with the same context share its forward pass, as branches that do not see each other; texts of about a length
    share a batch. The tokens are those of lm-eval: of context and continuation together, cut behind the context's own.

    Args:
        encode: a text's tokens, with the special tokens that its tokenizer puts before a text.
        limit: longest sequence of the model. Where a pair is longer, its beginning is left out (lm-eval leaves out one
            token less, whose successor it need not feed).
        begin: the token that stands for an empty context.
        progress: told how many pairs have been answered.
    """
    by_context: dict[str, list[int]] = {}
    for number, (context, _) in enumerate(pairs):
        by_context.setdefault(context, []).append(number)
    sequences: list[tuple[Packed, list[int]]] = []
    for context, numbers in by_context.items():
        texts = [pairs[number][1] for number in numbers]
        if context.strip():
            packed = packed_item(encode, context, texts, 0)
        else:
            packed = _after(begin, [encode(text) for text in texts])
        if packed.prefix + max(stop - start for start, stop, _ in packed.branches) <= limit:
            sequences.append((packed, numbers))
        else:
            sequences += [(_shortened(packed, one, limit), [number]) for one, number in enumerate(numbers)]
    found: dict[int, Continuation] = {}
    for chunk in _chunks(sequences):
        workload = Workload([packed for packed, _ in chunk], _device(model), batch_tokens)
        for answers, (_, numbers) in zip(workload.continuations(model), chunk, strict=True):
            found.update(zip(numbers, answers, strict=True))
        progress(sum(len(numbers) for _, numbers in chunk))
    return [found[number] for number in range(len(pairs))]


def text_likelihoods(
    model: nn.Module,
    encode: Encode,
    texts: Sequence[str],
    limit: int,
    begin: int,
    batch_tokens: int,
    progress: Progress = lambda done: None,
) -> list[float]:
    """Log-probability of whole texts, nats: every token after those before it, from `begin` on.

    A text longer than `limit` is cut into windows that do not overlap, each after the last token of the one before.
    """
    windows: list[tuple[Packed, list[int]]] = []
    for number, text in enumerate(texts):
        tokens = [begin, *encode(text)]
        starts = range(0, len(tokens) - 1, limit - 1)
        windows += [(_scored(tokens[start : start + limit], 1), [number]) for start in starts]
    totals = [0.0] * len(texts)
    for chunk in _chunks(windows):
        answers = Workload([packed for packed, _ in chunk], _device(model), batch_tokens).continuations(model)
        for [answer], (_, [number]) in zip(answers, chunk, strict=True):
            totals[number] += answer.loglikelihood
        progress(len(chunk))
    return totals


def _chunks(sequences: Sequence[tuple[Packed, list[int]]]) -> list[Sequence[tuple[Packed, list[int]]]]:
    """Sequences by length, so that a batch holds few padded tokens, so many at a time."""
    ordered = sorted(sequences, key=lambda pair: -len(pair[0].tokens))
    return [ordered[start : start + _CHUNK] for start in range(0, len(ordered), _CHUNK)]


def _after(begin: int, continuations: Sequence[Sequence[int]]) -> Packed:
    """Continuations of an empty context; `begin` is not doubled where a tokenizer has put it there itself."""
    tokens, branches = [begin], []
    for continuation in continuations:
        own = list(continuation[1:] if continuation[0] == begin and len(continuation) > 1 else continuation)
        branches.append((len(tokens), len(tokens) + len(own), len(tokens)))
        tokens += own
    return Packed(tuple(tokens), 1, tuple(branches), 0)


def _shortened(packed: Packed, branch: int, limit: int) -> Packed:
    """One branch of a sequence alone, its last `limit` tokens."""
    start, stop, first = packed.branches[branch]
    whole = packed.tokens[: packed.prefix] + packed.tokens[start:stop]
    scored = packed.prefix + first - start
    return _scored(whole[-limit:], max(1, scored - max(0, len(whole) - limit)))


def _scored(tokens: Sequence[int], first: int) -> Packed:
    """A sequence whose tokens from number `first` on are scored together."""
    return Packed(tuple(tokens), first, ((first, len(tokens), first),), 0)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device

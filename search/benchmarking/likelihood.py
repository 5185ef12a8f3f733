"""Compute log-likelihoods of continuations, with one forward pass for all continuations of a context.

Knows a causal language model and tokens; does not know lm-eval or tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from compression.refusal import Refusal
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
    begin: int | None,
    batch_tokens: int,
    progress: Progress = lambda done: None,
) -> list[Continuation]:
    """Log-likelihoods of pairs of context and continuation, in order.

    Pairs with the same context share one sequence, as branches that do not attend to each other; sequences of similar
    length share a batch. Tokenization follows lm-eval: context and continuation are encoded together and split at the
    length of the encoded context.

    Args:
        encode: gives the tokens of a text, including the special tokens that the tokenizer puts before a text.
        limit: longest sequence of the model, tokens. A longer pair loses tokens at its start. lm-eval keeps one more
            token, because it does not feed the last one.
        begin: the token that replaces an empty context; None if the tokenizer has none.
        batch_tokens: most tokens in one forward pass.
        progress: called with the number of pairs completed since the last call.

    Raises:
        Refusal: a context is empty and there is no `begin`.
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
            packed = _after(_needed(begin), [encode(text) for text in texts])
        if packed.prefix + max(stop - start for start, stop, _ in packed.branches) <= limit:
            sequences.append((packed, numbers))
        else:
            sequences += [(_shortened(packed, one, limit), [number]) for one, number in enumerate(numbers)]
    found: dict[int, Continuation] = {}
    for chunk in _chunks(sequences):
        workload = Workload([packed for packed, _ in chunk], model, batch_tokens)
        for answers, (_, numbers) in zip(workload.continuations(model), chunk, strict=True):
            found.update(zip(numbers, answers, strict=True))
        progress(sum(len(numbers) for _, numbers in chunk))
    return [found[number] for number in range(len(pairs))]


def text_likelihoods(
    model: nn.Module,
    encode: Encode,
    texts: Sequence[str],
    limit: int,
    begin: int | None,
    batch_tokens: int,
    progress: Progress = lambda done: None,
) -> list[float]:
    """Log-probability of whole texts, nats: all tokens are scored, the first one after `begin`.

    A text longer than `limit` tokens is cut into windows. Each window starts with the last token of the previous one
    as context, and no token is scored twice. Raises Refusal if there is no `begin`.
    """
    windows: list[tuple[Packed, list[int]]] = []
    for number, text in enumerate(texts):
        tokens = [_needed(begin), *encode(text)]
        starts = range(0, len(tokens) - 1, limit - 1)
        windows += [(_scored(tokens[start : start + limit], 1), [number]) for start in starts]
    totals = [0.0] * len(texts)
    for chunk in _chunks(windows):
        answers = Workload([packed for packed, _ in chunk], model, batch_tokens).continuations(model)
        for [answer], (_, [number]) in zip(answers, chunk, strict=True):
            totals[number] += answer.loglikelihood
        progress(len(chunk))
    return totals


def _chunks(sequences: Sequence[tuple[Packed, list[int]]]) -> list[Sequence[tuple[Packed, list[int]]]]:
    """Chunks of `_CHUNK` sequences, sorted by length so that batches need little padding."""
    ordered = sorted(sequences, key=lambda pair: -len(pair[0].tokens))
    return [ordered[start : start + _CHUNK] for start in range(0, len(ordered), _CHUNK)]


def _needed(begin: int | None) -> int:
    if begin is None:
        raise Refusal(
            "the tokenizer must have a token for the beginning or end of a text, to score a text from its start"
        )
    return begin


def _after(begin: int, continuations: Sequence[Sequence[int]]) -> Packed:
    """Continuations of an empty context, after `begin`, which is not repeated if the tokenizer has already put it."""
    tokens, branches = [begin], []
    for continuation in continuations:
        own = list(continuation[1:] if continuation[0] == begin and len(continuation) > 1 else continuation)
        branches.append((len(tokens), len(tokens) + len(own), len(tokens)))
        tokens += own
    return Packed(tuple(tokens), 1, tuple(branches), 0)


def _shortened(packed: Packed, branch: int, limit: int) -> Packed:
    """The last `limit` tokens of the prefix and one branch of a sequence."""
    start, stop, first = packed.branches[branch]
    whole = packed.tokens[: packed.prefix] + packed.tokens[start:stop]
    scored = packed.prefix + first - start
    return _scored(whole[-limit:], max(1, scored - max(0, len(whole) - limit)))


def _scored(tokens: Sequence[int], first: int) -> Packed:
    """A sequence whose tokens from index `first` on are scored together."""
    return Packed(tuple(tokens), first, ((first, len(tokens), first),), 0)

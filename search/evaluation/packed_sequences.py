"""Packing: texts and multiple-choice items as token sequences that share one forward pass.

Knows tokens and positions; no model. The answer choices of an item follow their common prefix side by side, as branches
that see the prefix and themselves only; several sequences lie in one row, and none sees another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from compression.refusal import Refusal

__all__ = ["Packed", "Prediction", "group", "layout", "mix", "pack", "packed_item", "packed_text", "predictions"]

_BATCH_COST = 48


@dataclass(frozen=True)
class Packed:
    """One packed sequence.

    Attributes:
        tokens: prefix, then the branches one after the other.
        prefix: length of the prefix; equal to the number of tokens for plain text.
        branches: per branch (start, stop, first scored), positions in `tokens`.
        answer: index of the correct branch, or None for text.
        corpus: name of what a text is from, for figures of its own; empty for none.
    """

    tokens: tuple[int, ...]
    prefix: int
    branches: tuple[tuple[int, int, int], ...] = ()
    answer: int | None = None
    corpus: str = ""


def packed_text(tokens: Sequence[int], corpus: str = "") -> Packed:
    """Plain text: every token after the first is scored."""
    return Packed(tuple(tokens), len(tokens), corpus=corpus)


def packed_item(encode: Callable[[str], list[int]], context: str, continuations: Sequence[str], answer: int) -> Packed:
    """A multiple-choice item. Tokenized as lm-eval does: context and continuation together, cut at the length of the
    context alone, spaces at the end of the context moved to the continuation.

    Raises:
        ValueError: an empty context or continuation, or an answer that is no index of a continuation.
    """
    if not context.strip() or not all(continuations):
        raise Refusal(f"an item needs a context and continuations that are not empty, got {context!r}")
    if not 0 <= answer < len(continuations):
        raise Refusal(f"answer must be an index below {len(continuations)}, got {answer}")
    spaces = context[len(context.rstrip()) :]
    context = context.rstrip()
    start = len(encode(context))
    wholes = [encode(context + spaces + continuation) for continuation in continuations]
    shared = min(start, *(len(whole) - 1 for whole in wholes))
    while shared > 1 and len({tuple(whole[:shared]) for whole in wholes}) > 1:
        shared -= 1
    tokens = list(wholes[0][:shared])
    branches = []
    for whole in wholes:
        first = len(tokens) + min(start, len(whole) - 1) - shared
        branches.append((len(tokens), len(tokens) + len(whole) - shared, first))
        tokens += whole[shared:]
    return Packed(tuple(tokens), shared, tuple(branches), answer)


@dataclass(frozen=True)
class Prediction:
    """One next-token prediction of a sequence.

    Attributes:
        source: flat position whose logits predict `target`.
        target: the token.
        owner: number of the sequence.
        branch: global number of the branch it scores, -1 for none.
        compared: whether it counts for KL and agreement: prefix and correct answer do.
    """

    source: int
    target: int
    owner: int
    branch: int
    compared: bool


def predictions(sequence: Packed, number: int, base: int, branches: range) -> list[Prediction]:
    """All predictions of sequence `number`, which begins at flat position `base` and has these branch numbers."""
    tokens = sequence.tokens
    found = [Prediction(base + at - 1, tokens[at], number, -1, True) for at in range(1, sequence.prefix)]
    for index, (start, stop, first) in enumerate(sequence.branches):
        for at in range(start, stop):
            before = sequence.prefix - 1 if at == start else at - 1
            branch = branches[index] if at >= first else -1
            found.append(Prediction(base + before, tokens[at], number, branch, index == sequence.answer))
    return found


def layout(sequence: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """Position ids (length,) and visibility (length, length): causal, branches blind to one another."""
    length = len(sequence.tokens)
    positions, visible = torch.arange(length), torch.ones(length, length, dtype=torch.bool).tril()
    for start, stop, _ in sequence.branches:
        positions[start:stop] = torch.arange(sequence.prefix, sequence.prefix + stop - start)
        visible[start:stop, sequence.prefix : start] = False
    return positions, visible


def pack(lengths: Sequence[int], capacity: int = 256) -> list[list[int]]:
    """Sequence numbers by row, first fit by descending length. A row has room for `capacity` tokens or one sequence.

    Short rows keep attention cheap: a row's sequences do not see each other, but the kernel computes all pairs.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        if lengths[number] < 2:
            continue
        place = next((place for place, left in enumerate(room) if lengths[number] <= left), None)
        if place is None:
            place = len(rows)
            rows.append([])
            room.append(max(capacity, lengths[number]))
        rows[place].append(number)
        room[place] -= lengths[number]
    return rows


def mix(rows: list[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    """The same rows, long and short ones, many sequences and few, spread evenly over any beginning of the list.

    Row number n of the result lies at the fraction nφ mod 1, φ the golden ratio, of the rows in order.
    """
    ordered = sorted(rows, key=lambda row: (len(row) == 1, sum(lengths[number] for number in row)))
    golden = (math.sqrt(5) - 1) / 2
    times = sorted(range(len(rows)), key=lambda time: time * golden % 1)
    return [row for _, row in sorted(zip(times, ordered, strict=True))]


def group(
    rows: list[list[int]], lengths: Sequence[int], batch_tokens: int, by_length: bool = True
) -> list[list[list[int]]]:
    """Batches of successive rows, ordered by length or as given, at most `batch_tokens` padded tokens in each.

    Of all such divisions the one with the fewest padded tokens, a batch counting as 48 more: what its fixed costs are
    worth.
    """
    ordered = sorted(rows, key=lambda row: sum(lengths[number] for number in row)) if by_length else rows
    sizes = [sum(lengths[number] for number in row) for row in ordered]
    best = [(0, 0)]  # cost of the first rows, and where their last batch begins
    for stop in range(1, len(ordered) + 1):
        found: list[tuple[int, int]] = []
        longest = 0
        for start in range(stop - 1, -1, -1):
            longest = max(longest, sizes[start])
            padded = (stop - start) * longest
            if padded > batch_tokens and found:
                break
            found.append((best[start][0] + padded + _BATCH_COST, start))
        best.append(min(found))
    batches = []
    stop = len(ordered)
    while stop:
        batches.append(ordered[best[stop][1] : stop])
        stop = best[stop][1]
    return batches[::-1]

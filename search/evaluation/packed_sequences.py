"""Pack texts and multiple-choice items into token sequences that share a forward pass.

The answer choices of an item follow their common prefix as branches; each branch attends only to the prefix and to
itself. Several sequences share a row without attending to each other. Knows tokens and positions; does not know models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from compression.refusal import Refusal

__all__ = [
    "ROW_TOKENS",
    "Packed",
    "Prediction",
    "apart",
    "classified_text",
    "group",
    "layout",
    "masked_text",
    "mix",
    "pack",
    "packed_item",
    "packed_text",
    "predictions",
    "row_inputs",
]

ROW_TOKENS = 256
"""Tokens that sequences which share a row have together at most."""
_BATCH_COST = 48


@dataclass(frozen=True)
class Packed:
    """One packed sequence.

    Attributes:
        tokens: tokens of the prefix, then of the branches one after the other.
        prefix: length of the prefix; for plain text this is the number of tokens.
        branches: (start, stop, first scored token) of each branch, as indices into `tokens`.
        answer: index of the correct branch, or None for text and for the only branch of a wrong answer (see `apart`).
        corpus: name of the corpus of a text or item, which then has figures of its own; empty for none.
        aside: whether the text counts in the figures of its corpus only, and in no other figure.
        masked: (place, original token) of the mask tokens of a text for a masked language model.
        classified: whether a classifier sorts the whole text; there is then one branch for every class, without tokens.
        uncounted: number of first tokens, those of an instruction, that are read but count for no figure; at most
            `prefix`.
    """

    tokens: tuple[int, ...]
    prefix: int
    branches: tuple[tuple[int, int, int], ...] = ()
    answer: int | None = None
    corpus: str = ""
    aside: bool = False
    masked: tuple[tuple[int, int], ...] = ()
    classified: bool = False
    uncounted: int = 0

    @property
    def alone(self) -> bool:
        """Whether an encoder reads the text, which then has a row of its own."""
        return bool(self.masked) or self.classified


def packed_text(tokens: Sequence[int], corpus: str = "") -> Packed:
    """Pack plain text, in which every token after the first is scored."""
    return Packed(tuple(tokens), len(tokens), corpus=corpus)


def masked_text(tokens: Sequence[int], masked: tuple[tuple[int, int], ...], corpus: str = "") -> Packed:
    """Pack a text for a masked language model, in which the original of every mask token is scored."""
    return Packed(tuple(tokens), len(tokens), corpus=corpus, masked=masked)


def classified_text(tokens: Sequence[int], classes: int, answer: int) -> Packed:
    """Pack a text for a classifier, in which the number of the class is scored.

    Raises:
        ValueError: `answer` is not the number of a class.
    """
    if not 0 <= answer < classes:
        raise Refusal(f"the class of a text must be a number below {classes}, got {answer}")
    end = len(tokens)
    return Packed(tuple(tokens), end, ((end, end, end),) * classes, answer, classified=True)


def packed_item(
    encode: Callable[[str], list[int]], context: str, continuations: Sequence[str], answer: int, instruction: str = ""
) -> Packed:
    """Pack a multiple-choice item, tokenized as in lm-eval.

    Spaces at the end of the context are moved to the continuation. Context and continuation are encoded together and
    split at the length of the encoded context.

    Args:
        instruction: start of the context whose tokens count for no figure. A compressed model soon learns a sentence
            that all items share, and its tokens would then outweigh those of the questions.

    Raises:
        ValueError: the context or a continuation is empty, or `answer` is not the index of a continuation.
    """
    if not context.strip() or not all(continuations):
        raise Refusal(f"the context and continuations of an item must not be empty, got the context {context!r}")
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
    pairs = zip(encode(instruction) if instruction else (), tokens[:shared], strict=False)
    uncounted = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return Packed(tuple(tokens), shared, tuple(branches), answer, uncounted=uncounted)


@dataclass(frozen=True)
class Prediction:
    """One prediction of a sequence: of the next token, a masked token or a class.

    Attributes:
        source: flat position whose logits predict `target`; the first position of a row for a class.
        target: the predicted token or class.
        owner: number of the sequence.
        branch: global number of the branch whose score includes this prediction, -1 for none.
        compared: whether it counts for KL and agreement; tokens of the prefix after the instruction and of the correct
            answer do.
    """

    source: int
    target: int
    owner: int
    branch: int
    compared: bool


def predictions(sequence: Packed, number: int, base: int, branches: range) -> list[Prediction]:
    """All predictions of a sequence that any figure needs.

    A wrong branch that `apart` took from its item has its own tokens only; those of the prefix belong to the correct
    one.

    Args:
        number: number of the sequence.
        base: flat position of its first token.
        branches: global numbers of its branches.
    """
    tokens = sequence.tokens
    if sequence.masked:
        return [Prediction(base + at, token, number, -1, True) for at, token in sequence.masked]
    if sequence.classified:
        return [Prediction(base, at, number, branch, at == sequence.answer) for at, branch in enumerate(branches)]
    found = [
        Prediction(base + at - 1, tokens[at], number, -1, True)
        for at in range(max(1, sequence.uncounted), sequence.prefix)
    ]
    for index, (start, stop, first) in enumerate(sequence.branches):
        for at in range(start, stop):
            before = sequence.prefix - 1 if at == start else at - 1
            branch = branches[index] if at >= first else -1
            found.append(Prediction(base + before, tokens[at], number, branch, index == sequence.answer))
    return found if sequence.answer is not None or not sequence.branches else [one for one in found if one.branch >= 0]


def layout(sequence: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """Position ids (length,) and attention mask (length, length): causal, with branches that cannot see each other."""
    length = len(sequence.tokens)
    positions, visible = torch.arange(length), torch.ones(length, length, dtype=torch.bool).tril()
    for start, stop, _ in sequence.branches:
        positions[start:stop] = torch.arange(sequence.prefix, sequence.prefix + stop - start)
        visible[start:stop, sequence.prefix : start] = False
    return positions, visible


def apart(sequence: Packed) -> list[Packed]:
    """The sequence as plain texts: one of the prefix and each branch, or the sequence itself if it has no branches.

    The correct branch has the answer 0 and the others None.
    """
    if sequence.alone or not sequence.branches:
        return [sequence]
    prefix, found = sequence.tokens[: sequence.prefix], []
    for number, (start, stop, first) in enumerate(sequence.branches):
        tokens = prefix + sequence.tokens[start:stop]
        branch = (len(prefix), len(tokens), len(prefix) + first - start)
        answer = 0 if number == sequence.answer else None
        found.append(Packed(tokens, len(prefix), (branch,), answer, uncounted=sequence.uncounted))
    return found


def row_inputs(rows: Sequence[Sequence[Packed]], shared: bool, least: int = 0) -> dict[str, torch.Tensor]:
    """The inputs of a model for rows of sequences, filled with token 0 on the right.

    Args:
        least: tokens of a row at least; the longest row counts if it is longer.
        shared: give the positions and the mask (rows, 1, length, length) that keep the sequences of a row and their
            branches apart. Otherwise every row must be one plain text; a causal model needs nothing else, and an
            encoder a mask (rows, length) that is 0 where a row is filled up.

    Returns:
        Arguments of the model by name; `input_ids` is (rows, length), int64.
    """
    length = max(least, *(sum(len(sequence.tokens) for sequence in row) for row in rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    visible = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)
    for place, row in enumerate(rows):
        start = 0
        for sequence in row:
            span = slice(start, start + len(sequence.tokens))
            ids[place, span] = torch.tensor(sequence.tokens)
            if shared:
                positions[place, span], visible[place, span, span] = layout(sequence)
            start = span.stop
    if shared:
        return {"input_ids": ids, "position_ids": positions, "attention_mask": visible[:, None]}
    if any(sequence.alone for row in rows for sequence in row):
        sizes = torch.tensor([sum(len(sequence.tokens) for sequence in row) for row in rows])
        return {"input_ids": ids, "attention_mask": (torch.arange(length) < sizes[:, None]).long()}
    return {"input_ids": ids}


def pack(lengths: Sequence[int], capacity: int = ROW_TOKENS) -> list[list[int]]:
    """Distribute sequences over rows, first fit by descending length; returns the sequence numbers of each row.

    A row holds up to `capacity` tokens, or one longer sequence. Short rows keep attention cheap: the sequences of a row
    do not attend to each other, but the kernel computes all pairs of positions. Sequences of less than two tokens are
    dropped, because they have nothing to predict.
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
    """Reorder rows so that any first part of the list is a fair mixture of long, short, single and shared rows.

    Row n of the result comes from the fraction nφ mod 1 of the sorted rows, where φ is the golden ratio
    (√5 − 1)/2.
    """
    ordered = sorted(rows, key=lambda row: (len(row) == 1, sum(lengths[number] for number in row)))
    golden = (math.sqrt(5) - 1) / 2
    times = sorted(range(len(rows)), key=lambda time: time * golden % 1)
    return [row for _, row in sorted(zip(times, ordered, strict=True))]


def group(
    rows: list[list[int]], lengths: Sequence[int], batch_tokens: int, by_length: bool = True
) -> list[list[list[int]]]:
    """Divide rows into batches of successive rows with at most `batch_tokens` tokens each, padding included.

    The division minimizes the total number of tokens, padding included, plus 48 per batch for its fixed costs.

    Args:
        by_length: sort the rows by length first; otherwise keep their order.
    """
    ordered = sorted(rows, key=lambda row: sum(lengths[number] for number in row)) if by_length else rows
    sizes = [sum(lengths[number] for number in row) for row in ordered]
    best = [(0, 0)]  # for each number of first rows: their least cost, and the start of their last batch
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

"""Pack the text for healing into rows of tokens of equal length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from compression.refusal import Refusal
from search.data.conversations import Document

__all__ = ["HealingText", "pack_rows"]


@dataclass(frozen=True, eq=False)
class HealingText:
    """Rows of text to learn from.

    Attributes:
        tokens: token ids, int32 (rows, length).
        wanted: bool (rows, length); true where healing learns to predict the token after this position.
        name: name of the text source, for display.
        left_out: number of documents excluded because they overlap with text or questions that results are reported on.
    """

    tokens: torch.Tensor
    wanted: torch.Tensor
    name: str
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def learned(self) -> int:
        """Number of positions learned from in one epoch."""
        return int(self.wanted.sum())


def pack_rows(
    encode: Callable[[str], list[int]],
    documents: Sequence[Document],
    length: int,
    name: str,
    left_out: int,
    tokens: int | None = None,
    beginning: Sequence[int] = (),
) -> HealingText:
    """Concatenate documents, separated by empty lines, and cut the result into rows of `length` tokens.

    Args:
        left_out: number of documents excluded beforehand, see `HealingText`.
        tokens: stop at the end of the document that reaches this many tokens; None uses all documents.
        beginning: special tokens that start every row.

    Raises:
        ValueError: the documents give less than one row.
    """
    stream: list[int] = []
    wanted: list[bool] = []
    for document in documents:
        if tokens is not None and len(stream) >= tokens:
            break
        for text, learn in (*document.parts, ("\n\n", False)):
            encoded = encode(text)
            stream += encoded
            wanted += [learn] * len(encoded)
    room = length - len(beginning)
    rows = len(stream) // room
    if not rows:
        raise Refusal(f"healing needs {length} tokens of text or more, and {name} has {len(stream)}")
    first = torch.tensor(beginning, dtype=torch.int32).expand(rows, -1)
    every = torch.cat([first, torch.tensor(stream[: rows * room], dtype=torch.int32).view(rows, room)], dim=1)
    learned = torch.cat([first.new_zeros(first.shape).bool(), torch.tensor(wanted[: rows * room]).view(rows, room)], 1)
    next_wanted = learned.roll(-1, dims=1)
    next_wanted[:, -1] = False  # the token after the last one is not in the row
    return HealingText(every, next_wanted, name, left_out)

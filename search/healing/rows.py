"""Text for healing as rows of tokens of equal length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from compression.refusal import Refusal
from search.data.conversations import Document

__all__ = ["HealingText", "pack_rows"]


@dataclass(frozen=True, eq=False)
class HealingText:
    """Rows to learn from.

    Attributes:
        tokens: int32 (rows, length).
        wanted: bool (rows, length): whether the token after this one is to be learned.
        name: where they come from, for people.
        left_out: how many documents shared words with what is reported.
    """

    tokens: torch.Tensor
    wanted: torch.Tensor
    name: str
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def learned(self) -> int:
        """Positions to learn from in one epoch."""
        return int(self.wanted.sum())


def pack_rows(
    encode: Callable[[str], list[int]],
    documents: Sequence[Document],
    length: int,
    name: str,
    left_out: int,
    tokens: int | None = None,
) -> HealingText:
    """Documents one after the other with an empty line between, cut into rows of `length` tokens.

    Args:
        tokens: stop once there are so many.

    Raises:
        ValueError: less than one row.
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
    rows = len(stream) // length
    if not rows:
        raise Refusal(f"healing needs {length} tokens of text or more, and {name} has {len(stream)}")
    next_wanted = torch.tensor([*wanted[1:], False][: rows * length]).view(rows, length)
    next_wanted[:, -1] = False  # what follows a row is not in it
    return HealingText(
        torch.tensor(stream[: rows * length], dtype=torch.int32).view(rows, length), next_wanted, name, left_out
    )

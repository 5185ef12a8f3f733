"""Which documents of a benchmark are measured: a stratified, seeded selection."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from search.benchmarking.tasks import Task

__all__ = ["Document", "Selection"]


@dataclass(frozen=True)
class Document:
    """One row of a benchmark, as the stock task expects it.

    Attributes:
        row: its fields.
        digest: of its question, see `search.data.items.Item.digest`.
        subject: what it is about, "" if unknown.
    """

    row: Mapping[str, Any]
    digest: str
    subject: str = ""

    @cached_property
    def choices(self) -> tuple[str, ...]:
        """All of the row, by which equal questions are told apart; an item's choices where it has them."""
        given = self.row.get("choices")
        return tuple(given) if isinstance(given, list) else (json.dumps(self.row, sort_keys=True),)


@dataclass(frozen=True)
class Selection:
    """What a task is scored on.

    Attributes:
        task: the task.
        documents: in a seeded order, every subject in proportion.
        available: how many the task has, those searched on included.
        searched: how many of them were left out because a search used them.
    """

    task: Task
    documents: tuple[Document, ...]
    available: int
    searched: int

    @cached_property
    def digest(self) -> str:
        """sha256 over the rows in order, in hex."""
        rows = json.dumps([document.row for document in self.documents], sort_keys=True)
        return hashlib.sha256(rows.encode()).hexdigest()

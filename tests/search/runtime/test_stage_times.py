"""The seconds of every stage of a run add up over its sessions."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from search.runtime.console import Console
from search.runtime.stage_times import StageTimes


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_stages_of_all_sessions_are_added_up_from_the_first(tmp_path: Path) -> None:
    path, clock = tmp_path / "stages.csv", _Clock()
    for _ in range(2):
        console = Console(io.StringIO(), clock=clock)
        with console.stage("load"):  # ends before the run has a folder
            clock.now += 2
        console.time_stages(StageTimes(path).add)
        with pytest.raises(KeyboardInterrupt), console.stage("search"):
            clock.now += 30.26
            raise KeyboardInterrupt
    assert path.read_text() == "stage,seconds\nload,4.0\nsearch,60.6\n"


@pytest.mark.parametrize(
    "content", ["", "stage\n", "stage,seconds\nload,x\n", "a,b\nload,1\n", "stage,seconds\nload,-1\n"]
)
def test_a_file_that_cannot_be_read_is_begun_anew(content: str, tmp_path: Path) -> None:
    path = tmp_path / "stages.csv"
    path.write_text(content)
    StageTimes(path).add("heal", 1)
    assert path.read_text() == "stage,seconds\nheal,1.0\n"

"""Curves for TensorBoard: those of a whole run can be read back, and what goes wrong with them harms nothing."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest
from fake_data import fake_data
from small_run import HEAL, words
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from search import cli
from search.runtime.tensorboard import CURVES, Curves, curves

__all__ = ["fake_data"]


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / CURVES)).Reload()
    # By step: files of one second are read in the order of a counter in their names, where 10 comes before 9.
    return {tag: sorted((point.step, point.value) for point in events.Scalars(tag)) for tag in events.Tags()["scalars"]}


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_a_run_leaves_the_curves_of_its_search_and_of_its_healing(tmp_path: Path) -> None:
    assert cli.main(words(out=str(tmp_path / "run"), agent="evolution", **HEAL)) == 0
    found = read(tmp_path / "run")
    assert [step for step, _ in found["search/KL"]] == list(range(6))
    assert found.keys() == {"search/reward", "search/KL", "search/kept"}
    healed = read(tmp_path / "run" / "healed")
    assert {"heal/loss", "heal/KL", "heal/perplexity"} <= healed.keys()
    assert healed["heal/KL"][0][0] == 0


def test_what_is_no_number_is_left_out_and_a_continued_run_adds_to_what_is_there(tmp_path: Path) -> None:
    for step, value in ((0, 1.0), (1, float("nan")), (2, 3.0)):
        with curves(tmp_path) as drawn:
            drawn.draw(step, {"one": value})
    assert read(tmp_path) == {"one": [(0, 1.0), (2, 3.0)]}


def test_without_tensorboard_nothing_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with curves(tmp_path) as drawn:
        drawn.draw(0, {"one": 1.0})
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_ends_the_curves_and_nothing_else(tmp_path: Path) -> None:
    class Full:
        calls = 0

        def add_scalar(self, *arguments: object) -> None:
            self.calls += 1
            raise OSError(errno.ENOSPC, "No space left on device")

    writer = Full()
    drawn = Curves(writer)
    drawn.draw(0, {"one": 1.0, "two": 2.0})
    drawn.draw(1, {"one": 1.0})
    drawn.close()
    assert writer.calls == 1

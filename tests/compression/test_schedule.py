"""Schedules: identity, canonical form, refusals."""

import pytest

from compression import DENSE, Choice, Schedule


def test_json_round_trip_keeps_identity() -> None:
    schedule = Schedule((("a", DENSE), ("b", Choice("lowrank", 7, "two-sided"))))
    again = Schedule.from_json(schedule.to_json())
    assert again == schedule
    assert again.digest == schedule.digest
    assert len(schedule.digest) == 64


def test_any_difference_changes_the_digest() -> None:
    base = Schedule((("a", Choice("lowrank", 7, "two-sided")),))
    others = [
        Schedule((("a", Choice("lowrank", 8, "two-sided")),)),
        Schedule((("a", Choice("lowrank", 7, "input")),)),
        Schedule((("a", Choice("mpo2", 7, "two-sided")),)),
        Schedule((("b", Choice("lowrank", 7, "two-sided")),)),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 5


@pytest.mark.parametrize("chi", [0, -1, 1.5, True, "7", None])
def test_a_chi_that_is_no_positive_integer_is_refused(chi: object) -> None:
    with pytest.raises(ValueError, match="chi"):
        Choice("lowrank", chi, "plain")  # type: ignore[arg-type]


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="repeated"):
        Schedule((("a", DENSE), ("a", DENSE)))
    with pytest.raises(ValueError, match="metric"):
        Choice("lowrank", 3, "frobenius")
    with pytest.raises(ValueError, match="rows"):
        Schedule.from_json('{"a": 1}')

import math
from dataclasses import dataclass, replace

import pytest

from envs import Reward, ToyScore

SCORE = ToyScore(kl=0.5, expected_accuracy=0.26, kept_fraction=0.8)


def test_the_formula_is_the_documented_one():
    reward = Reward(kl_weight=2, correct_weight=3, compression_weight=5, dense_expected_accuracy=0.3)
    assert reward(SCORE) == pytest.approx(-2 * 0.5 + 3 * (0.26 - 0.3) + 5 * 0.2)


@dataclass(frozen=True)
class Measured:
    """A score whose fractions differ."""

    kl: float = 0.5
    expected_accuracy: float = 0.26
    kept_fraction: float = 0.8
    bytes_fraction: float = 0.84
    time_fraction: float = 0.9
    state: str = "ok"


def test_bytes_and_time_count_when_they_have_a_weight():
    base = Reward()(Measured())
    assert Reward(bytes_weight=2)(Measured()) == pytest.approx(base + 2 * 0.16)
    assert Reward(latency_weight=3)(Measured()) == pytest.approx(base + 3 * 0.1)
    assert Reward(latency_weight=3)(Measured(time_fraction=1.2)) < base


def test_a_time_that_nobody_asked_for_is_no_failure_and_one_that_is_missing_is():
    assert Reward()(Measured(time_fraction=math.nan)) == Reward()(Measured())
    assert Reward(latency_weight=1)(Measured(time_fraction=math.nan)) == Reward().floor


def test_the_dense_model_earns_nothing():
    assert Reward(dense_expected_accuracy=0.3)(ToyScore(0.0, 0.3, 1.0)) == 0


@pytest.mark.parametrize("change", [dict(kl=0.6), dict(expected_accuracy=0.25), dict(kept_fraction=0.9)])
def test_worse_is_less(change):
    assert Reward()(replace(SCORE, **change)) < Reward()(SCORE)


@pytest.mark.parametrize(
    "change",
    [
        dict(state="failed"),
        dict(state="nonfinite"),
        dict(kl=math.nan),
        dict(kl=math.inf),
        dict(expected_accuracy=math.nan),
    ],
)
def test_a_failure_earns_the_floor(change):
    assert Reward(floor=-7)(replace(SCORE, **change)) == -7


def test_nothing_lies_below_the_floor():
    assert Reward(floor=-7)(replace(SCORE, kl=100.0)) == -7


@pytest.mark.parametrize(
    "change",
    [
        dict(kl_weight=-1.0),
        dict(correct_weight=math.nan),
        dict(latency_weight=-0.1),
        dict(bytes_weight=math.inf),
        dict(floor=-math.inf),
    ],
)
def test_a_wrong_weight_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Reward(**change)

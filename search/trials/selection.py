"""Selects the result of a search on selection text, which no trial reads."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compression.schedule import Schedule
from search.evaluation.evaluator import Scoring
from search.evaluation.quality import paired_kl
from search.evaluation.score import Score
from search.runtime.console import Stage

__all__ = ["challengers", "finalist_count", "select"]

_MOST = 6


def finalist_count(budget: int) -> int:
    """Number of an agent's recommendations that are compared with the closed form on the selection text: 1 to 6.

    1 + √budget. The recommendations of a short search are few and hardly differ, while each that was not measured
    before must be cut anew, which takes minutes at billions of parameters.

    Args:
        budget: evaluations of the search.
    """
    return min(_MOST, 1 + math.isqrt(budget))


def select(
    evaluator: Scoring,
    closed_form: Schedule,
    reference: Score,
    finalists: Sequence[Schedule],
    stage: Stage | None = None,
) -> Schedule:
    """The finalist with the lowest KL on the selection text and items, if it beats the closed form there.

    A finalist beats the closed form if their paired KL difference is below minus one standard error; otherwise the
    closed form is selected. The evaluation of a finalist stops early once it is clearly worse than the best so far,
    see `search.evaluation.early_stopping`.

    Args:
        evaluator: scores on the selection text and items.
        reference: score of the closed form on the same data.
    """
    best, best_value = closed_form, math.inf
    rival = reference if reference.state == "ok" else None
    for schedule in challengers(closed_form, finalists):
        [score] = evaluator.evaluate([schedule], rival)
        if score.state == "ok" and reference.state == "ok":
            difference = paired_kl(score.quality, reference.quality)
            if difference.value < min(best_value, -difference.standard_error):
                best, best_value, rival = schedule, difference.value, score
        if stage is not None:
            stage.advance(1)
    return best


def challengers(closed_form: Schedule, finalists: Sequence[Schedule]) -> list[Schedule]:
    """The finalists that differ from the closed form, without duplicates."""
    different = {schedule.digest: schedule for schedule in finalists if schedule.digest != closed_form.digest}
    return list(different.values())

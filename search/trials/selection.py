"""Chooses what a search ends with, on text that no trial saw."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compression.schedule import Schedule
from search.evaluation.evaluator import Evaluator
from search.evaluation.quality import paired_kl
from search.evaluation.score import Score
from search.runtime.console import Stage

__all__ = ["FINALISTS", "challengers", "select"]

FINALISTS = 6
"""Recommendations of an agent that meet the closed form on the selection set."""


def select(
    evaluator: Evaluator,
    closed_form: Schedule,
    reference: Score,
    finalists: Sequence[Schedule],
    stage: Stage | None = None,
) -> Schedule:
    """The finalist with the lowest KL on text and items that no trial saw, if it beats the closed form there.

    To beat it means a paired KL difference below minus one standard error; otherwise the closed form stays. A finalist
    that is clearly worse than the best so far is not measured to the end, see `search.evaluation.early_stopping`.

    Args:
        evaluator: on the selection set.
        reference: score of the closed form there.
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
    """The finalists that differ from the closed form, each once."""
    different = {schedule.digest: schedule for schedule in finalists if schedule.digest != closed_form.digest}
    return list(different.values())

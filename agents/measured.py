"""Turns what was measured into what a critic learns from (`agents.slope_critic`)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from agents.protocol import AgentContext, ProblemLike, Proposal
from compression.schedule import Schedule

__all__ = ["measured_quality", "measured_slopes"]

Floats = NDArray[np.float64]


def measured_slopes(
    problem: ProblemLike, schedule: Schedule, probe: Schedule, slopes: Mapping[str, float]
) -> tuple[Floats, Floats, Floats, Floats]:
    """The arrays that `SlopeCritic.add_slopes` takes, (sites,) each.

    Args:
        schedule, probe: those of the proposal.
        slopes: nats per token by site; a site whose slope is missing or not finite counts as not measured.
    """
    measured, predicted = problem.gains(schedule, probe, slopes)
    known = np.array([name in slopes for name in problem.sites])
    cost, then = problem.costs(schedule), problem.costs(probe)
    return cost, then, np.where(known, measured, np.nan), predicted


def measured_quality(problem: ProblemLike, context: AgentContext, proposal: Proposal, reward: float) -> float:
    """A reward without the term of the size."""
    return float(reward) - context.compression_weight * (1 - problem.kept(proposal.schedule))

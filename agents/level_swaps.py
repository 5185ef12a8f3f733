"""Generates neighbours of an episode at about equal size by level switches, and climbs from neighbour to neighbour.

A switch raises one step's level and lowers another's by the same number (Sieberling et al. 2024, EvoPress, §3); the
problem's projection then meets the target exactly. Knows episodes and a function that values them; does not know
schedules or rewards.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from agents.protocol import ProblemLike

__all__ = ["climb", "swapped"]

Floats = NDArray[np.float64]
Levels = NDArray[np.int64]


def swapped(problem: ProblemLike, actions: Levels, most: int, reach: int, generator: np.random.Generator) -> Levels:
    """Returns one neighbour of each episode, (n, steps) -> (n, steps), after 1 to `most` random switches.

    Small numbers of switches are likelier than large ones.

    Args:
        most: largest number of switches, at least 1.
        reach: largest number of levels by which one switch moves its two steps, at least 1.
    """
    actions = actions.copy()
    count = generator.integers(1, most + 1, (len(actions), 2)).min(axis=1)
    for turn in range(most):
        rows = np.flatnonzero(count > turn)
        steps = generator.random((len(rows), problem.steps)).argsort(axis=1, kind="stable")
        distance = generator.integers(1, reach + 1, len(rows))
        up, down = steps[:, 0], steps[:, -1]
        actions[rows, up] += distance
        if problem.steps > 1:
            actions[rows, down] -= distance
    return problem.legalise(np.clip(actions, 0, problem.levels - 1))


def climb(
    problem: ProblemLike,
    starts: Levels,
    value: Callable[[Levels, NDArray[np.int64]], Floats],
    rounds: int,
    children: int,
    most: int,
    reach: int,
    generator: np.random.Generator,
) -> Levels:
    """Climbs from every start, (n, steps) -> (n, steps).

    In each of `rounds` rounds, an episode is replaced by the best of `children` neighbours if that neighbour is better.

    Args:
        value: value of each episode, (m, steps) and the index of the start it comes from, (m,) -> (m,).
        most: see `swapped`.
        reach: see `swapped`.
    """
    at = starts.copy()
    own = np.arange(len(starts))
    best = value(at, own)
    for _ in range(rounds):
        origin = np.repeat(own, children)
        near = swapped(problem, at[origin], most, reach, generator)
        values = value(near, origin).reshape(len(starts), children)
        chosen = values.argmax(axis=1)
        better = values[own, chosen] > best
        at[better] = near.reshape(len(starts), children, -1)[own, chosen][better]
        best = np.where(better, values[own, chosen], best)
    return at

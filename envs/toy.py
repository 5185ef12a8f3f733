"""Provides a toy problem: a menu of a few blocks and an evaluator whose optimum can be found by exhaustion.

Uses no model. The true cost deviates from the predicted one as in a real network: blocks matter more or less than
predicted, and the errors of two blocks add up or cancel. The closed form is therefore good but not optimal.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from compression.allocation.menu import Menu, SiteMenu
from compression.refusal import Refusal
from compression.schedule import DENSE, SPARSE, Choice, Joint, Schedule
from compression.sites import Cut, Site, Unit
from envs.problem import Problem
from envs.reward import ScoreLike

__all__ = ["ToyEvaluator", "ToyScore", "best_by_exhaustion", "toy_menu"]

_WIDTH = 64


@dataclass(frozen=True)
class ToyScore:
    """Holds a score of the toy. `expected_accuracy` falls with increasing KL from 0.3 towards chance, 0.25."""

    kl: float
    expected_accuracy: float
    kept_fraction: float
    state: str = "ok"

    @property
    def bytes_fraction(self) -> float:
        """Bytes after / before; equals the kept fraction, because the toy consists of its sites only."""
        return self.kept_fraction

    @property
    def time_fraction(self) -> float:
        """Time after / before; equals the kept fraction, because the time is taken to be the multiply-adds."""
        return self.kept_fraction


def toy_menu(blocks: int = 3, heads: int = 0, bonds: bool = False, pruned: bool = False) -> Menu:
    """Returns a menu with two square sites per block, `lowrank` at every second χ, and costs that decay with χ.

    The rate of decay differs between sites.

    Args:
        blocks: number of blocks, at least 1.
        heads: if not 0, attention is split into `heads` sites that produce heads and `heads` sites that read them.
        bonds: whether each MLP is instead a unit of two sites, "up" and "down", with as many parameters together, that
            are joined by a bond. Its options are widths of the bond with the sizes and costs of those χ.
        pruned: whether every second option of a site is instead a pruned matrix of the same size and cost.
    """
    if blocks < 1:
        raise Refusal(f"blocks must be at least 1, got {blocks}")
    sites = []
    chis = np.arange(2, _WIDTH // 2, 2)
    parts = [(f"attention.{matrix}.{head}", "attention") for matrix in ("make", "read") for head in range(heads)]
    members = [*(parts or [("attention", "attention")]), ("mlp", "mlp")]
    for number, (block, (name, family)) in enumerate(itertools.product(range(blocks), members)):
        scale, rate = 0.2 + 0.1 * (number % 3), 0.06 + 0.02 * (number % 4)
        site: Site | Unit = Site(f"blocks.{block}.{name}", block, family, _WIDTH, _WIDTH)
        choices: list[Choice | Joint] = [Choice("lowrank", int(chi), "two-sided") for chi in chis]
        if pruned:
            choices[::2] = [Choice(SPARSE, 2 * _WIDTH * int(chi), "two-sided") for chi in chis[::2]]
        if bonds and name == "mlp":
            site, choices = (
                _unit(site.name, block),
                [Joint((Choice("dense", 0, "none", (int(chi),)),) * 2) for chi in chis],
            )
        sites.append(
            SiteMenu(
                site=site,
                choices=(*choices, Joint((DENSE,) * 2) if isinstance(site, Unit) else DENSE),
                parameters=np.append(chis * 2 * _WIDTH, _WIDTH * _WIDTH).astype(np.int64),
                cost=np.append(scale * np.exp(-rate * chis), 0.0),
                multiply_adds=np.append(chis * 2 * _WIDTH, _WIDTH * _WIDTH).astype(np.int64),
            )
        )
    return Menu(tuple(sites))


def _unit(name: str, block: int) -> Unit:
    """An MLP of two sites whose bond has half as many units as the toy's matrices have columns."""
    half = _WIDTH // 2
    up = Site(f"{name}.up", block, "up", half, _WIDTH, cuts=(Cut(name, half, 1, of_rows=True),))
    down = Site(f"{name}.down", block, "down", _WIDTH, half, cuts=(Cut(name, half, 1, of_rows=False),))
    return Unit(name, block, "mlp", (up, down))


@dataclass(frozen=True, eq=False)
class ToyEvaluator:
    """Scores schedules by KL = Σ_b w_b·c_b + Σ_{b<b'} ±s·√(c_b·c_b'), where c_b is the predicted cost of block b.

    The weights w_b cycle through `weights`. The magnitude s is `interaction`; the sign is + at odd distances of the two
    blocks and − at even ones.
    """

    menu: Menu
    weights: tuple[float, ...] = (1.6, 0.7, 1.0)
    interaction: float = 0.3

    def __call__(self, schedules: Sequence[Schedule]) -> list[ToyScore]:
        """Returns scores in the order of `schedules`."""
        return [self._score(schedule) for schedule in schedules]

    def slopes(self, schedule: Schedule, toward: Schedule, repeat: int = 0) -> dict[str, float]:
        """Returns first-order changes of the KL by site, with the properties that those of a model have.

        The KL of a model is quadratic in the errors. If the site that moves has an error already, the slope is about
        twice the change of the KL. If the site is dense, the slope contains only the interaction with the errors of
        other sites and not the cost of the site's own error.
        """
        base, found = self._score(schedule).kl, {}
        for site in self.menu.sites:
            names = {each.name for each in site.sites}
            if site.taken(schedule) != site.taken(toward):
                moved = Schedule(tuple((key, toward[key] if key in names else choice) for key, choice in schedule))
                change = self._score(moved).kl - base
                own = float(site.cost[site.index(toward)])
                found[site.site.name] = change - own if site.taken(schedule).is_dense else 2 * change
        return found

    def _score(self, schedule: Schedule) -> ToyScore:
        cost = np.zeros(1 + max(site.site.block for site in self.menu.sites))
        kept = 0
        for site in self.menu.sites:
            option = site.index(schedule)
            cost[site.site.block] += site.cost[option]
            kept += int(site.parameters[option])
        kl = sum(self.weights[block % len(self.weights)] * float(c) for block, c in enumerate(cost))
        for left, right in itertools.combinations(range(len(cost)), 2):
            sign = 1.0 if (right - left) % 2 else -1.0
            kl += sign * self.interaction * float(np.sqrt(cost[left] * cost[right]))
        return ToyScore(kl, 0.25 + 0.05 * float(np.exp(-kl)), kept / self.menu.dense_parameters)


def best_by_exhaustion(
    problem: Problem,
    evaluate: Callable[[Sequence[Schedule]], Sequence[ScoreLike]],
    reward: Callable[[ScoreLike], float],
) -> tuple[Schedule, float]:
    """Returns the schedule of highest reward over all legal actions, and its reward.

    Needs at most levels^steps evaluations.
    """
    best: tuple[Schedule, float] | None = None
    for actions in itertools.product(range(problem.levels), repeat=problem.steps):
        if all(problem.mask(actions[:step])[level] for step, level in enumerate(actions)):
            schedule = problem.schedule(actions)
            value = reward(evaluate([schedule])[0])
            if best is None or value > best[1]:
                best = schedule, value
    assert best is not None
    return best

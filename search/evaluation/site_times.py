"""Estimate the running time of a schedule from measured times of single layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray

from compression.allocation.menu import SiteMenu
from compression.layers.planner import Planner
from compression.numerics.legs import resolve
from compression.schedule import Choice, Schedule
from compression.sites import Site
from search.evaluation.latency import PROMPT

__all__ = ["SiteTimes"]

_LENGTHS = (1, PROMPT)  # tokens of the passes whose times are averaged


@dataclass(frozen=True, eq=False)
class SiteTimes:
    """Time of the sites under a schedule divided by their dense time, from the planner's costs of single layers.

    The result is the mean of two fractions, one for a prompt of 512 tokens and one for single tokens. In each fraction
    a site is weighted by its number of dense parameters, since its dense time is proportional to them: single tokens
    are limited by reading the parameters, prompts by multiplying with them. Attention, embeddings and everything else
    that a schedule does not change are excluded; `search.evaluation.latency.Latency` includes them.
    """

    sites: Sequence[Site]
    planner: Planner
    dtype: torch.dtype
    device: torch.device

    def __call__(self, schedule: Schedule) -> float:
        """The time fraction of a schedule; 1 for the dense schedule."""
        return fmean(self._fraction(schedule, tokens) for tokens in _LENGTHS)

    def shares(self, options: SiteMenu) -> NDArray[np.float64]:
        """The contribution of each option of a site to the time fraction (options,)."""
        total = sum(each.parameters for each in self.sites)
        site_of = {site.name: site for site in options.sites}

        def share(index: int) -> float:
            pairs = [(site_of[name], choice) for name, choice in options.assigned(index)]
            times = (
                site.parameters * self._share(site, choice, tokens) for site, choice in pairs for tokens in _LENGTHS
            )
            return sum(times) / (len(_LENGTHS) * total)

        return np.array([share(index) for index in range(len(options.choices))])

    def _fraction(self, schedule: Schedule, tokens: int) -> float:
        total = sum(self._share(site, schedule[site.name], tokens) * site.parameters for site in self.sites)
        return total / sum(site.parameters for site in self.sites)

    def _share(self, site: Site, choice: Choice, tokens: int) -> float:
        """Time of a choice divided by that of the dense site, for a pass of `tokens` tokens."""
        rows, columns = site.shape(choice.widths)
        if not choice.is_factored:  # a pruned matrix is filled in and multiplied as a dense one
            return rows * columns / site.parameters
        legs = resolve(choice.topology, rows, columns)
        return rows * columns / site.parameters * self.planner.share(legs, choice.chi, self.dtype, self.device, tokens)

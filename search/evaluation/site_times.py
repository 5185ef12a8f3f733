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
        return fmean(self._fraction(schedule, tokens) for tokens in (1, PROMPT))

    def shares(self, options: SiteMenu) -> NDArray[np.float64]:
        """The contribution of each option of a site to the time fraction (options,)."""
        site = options.site
        whole = site.parameters / sum(each.parameters for each in self.sites)
        return np.array(
            [whole * fmean(self._share(site, choice, tokens) for tokens in (1, PROMPT)) for choice in options.choices]
        )

    def _fraction(self, schedule: Schedule, tokens: int) -> float:
        total = sum(self._share(site, schedule[site.name], tokens) * site.parameters for site in self.sites)
        return total / sum(site.parameters for site in self.sites)

    def _share(self, site: Site, choice: Choice, tokens: int) -> float:
        """Time of a choice divided by that of the dense site, for a pass of `tokens` tokens."""
        if choice.is_dense:
            return 1.0
        legs = resolve(choice.topology, site.out_features, site.in_features)
        return self.planner.share(legs, choice.chi, self.dtype, self.device, tokens)

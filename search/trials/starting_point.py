"""The starting point of a search: the closed form, a prior instead of it, or a policy that an earlier search learned.

The files are read once, before anything is loaded, and passed on. The prior's log weights become the base of the
problem (`envs.Problem.centred`), so every agent that searches around the closed form searches around the prior, with
the same levels and at any target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agents import SavedPolicy
from compression.sites import Site
from envs import Problem
from search.config import Config
from search.model.loading import LoadedModel
from search.priors.format import Prior
from search.priors.transfer import check_families, transfer

__all__ = ["StartingPoint"]


@dataclass(frozen=True)
class StartingPoint:
    """What a search starts from. Without a prior and without a policy it starts from the closed form."""

    prior: Prior | None = None
    policy: SavedPolicy | None = None

    @classmethod
    def read(cls, config: Config) -> StartingPoint:
        """Read what `config.prior` and `config.policy` name.

        Raises:
            Refusal: as `Prior.read` and `SavedPolicy.read`, or a policy that another agent has learned.
        """
        policy = None if config.policy is None else SavedPolicy.read(Path(config.policy))
        if policy is not None:
            policy.check(config.agent, policy.model)
        return cls(None if config.prior is None else Prior.read(Path(config.prior)), policy)

    def check(self, loaded: LoadedModel, sites: Sequence[Site]) -> None:
        """Raises Refusal for a policy of another model, or a prior whose families the model does not have."""
        if self.policy is not None:
            self.policy.check(self.policy.agent, loaded.digest)
        if self.prior is not None:
            check_families(self.prior, sites)

    def identity(self) -> dict[str, str]:
        """Digests of what is there, for the fingerprint of a search; independent of paths and formatting."""
        digests = {}
        if self.policy is not None:
            digests["policy"] = self.policy.digest
        if self.prior is not None:
            digests["prior"] = hashlib.sha256(self.prior.to_json().encode()).hexdigest()
        return digests

    def center(self, problem: Problem) -> tuple[Problem, tuple[str, ...]]:
        """The problem around the prior and remarks on how the prior was transferred; unchanged without a prior.

        Raises:
            Refusal: as `search.priors.transfer.transfer`.
        """
        if self.prior is None:
            return problem, ()
        found = transfer(self.prior, problem.menu)
        return problem.centred(found.log_weights), found.notes

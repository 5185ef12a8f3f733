"""Warm start: a search that begins at a prior instead of the closed form.

The prior's log weights become the base of the problem (`envs.Problem.centred`), so every agent that searches around the
closed form searches around the prior, with the same levels and at any target.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from agents import SavedPolicy
from envs import Problem
from search.config import Config
from search.model.loading import LoadedModel
from search.priors.format import Prior
from search.priors.transfer import transfer

__all__ = ["prior_digest", "read_policy", "read_prior", "warm_start"]


def read_prior(config: Config) -> Prior | None:
    """The prior of a configuration, if it has one; raises ValueError as `Prior.read` does."""
    return None if config.prior is None else Prior.read(Path(config.prior))


def prior_digest(config: Config) -> str | None:
    """sha256 of what that prior says, wherever it lies and however it is formatted."""
    prior = read_prior(config)
    return None if prior is None else hashlib.sha256(prior.to_json().encode()).hexdigest()


def warm_start(config: Config, problem: Problem) -> tuple[Problem, tuple[str, ...]]:
    """The problem around the prior, and what was done in words; as it is without one.

    Raises:
        ValueError: as `Prior.read` and `search.priors.transfer.transfer`.
    """
    prior = read_prior(config)
    if prior is None:
        return problem, ()
    found = transfer(prior, problem.menu)
    return problem.centred(found.log_weights), found.notes


def read_policy(config: Config, loaded: LoadedModel | None = None) -> SavedPolicy | None:
    """What the search starts from, refused if it is of another agent or, once that is known, of another model."""
    if config.policy is None:
        return None
    policy = SavedPolicy.read(Path(config.policy))
    policy.check(config.agent, policy.model if loaded is None else loaded.digest)
    return policy

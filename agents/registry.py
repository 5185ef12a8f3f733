"""Registry: agents by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from agents.bandit import Bandit
from agents.evolution import Evolution
from agents.fixed import Knapsack, Lagrangian, Uniform
from agents.portfolio import Portfolio
from agents.protocol import Agent, Task, Terms
from agents.random_search import RandomSearch
from agents.reinforce import Reinforce

__all__ = ["NAMES", "make"]

_AGENTS: dict[str, Callable[[Task, Terms], Agent]] = {
    agent.name: agent
    for agent in (Reinforce, Evolution, Bandit, Portfolio, RandomSearch, Lagrangian, Knapsack, Uniform)
}

NAMES: tuple[str, ...] = tuple(_AGENTS)


def make(name: str, task: Task, terms: Terms) -> Agent:
    """The agent called `name`, working on `task`.

    Raises:
        ValueError: no such agent, with the nearest name.
    """
    if name not in _AGENTS:
        nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
        raise ValueError(f"agent must be one of {', '.join(NAMES)}, got {name!r}; nearest: {nearest}")
    return _AGENTS[name](task, terms)

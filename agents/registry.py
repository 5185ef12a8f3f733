"""Finds agents by name and imports each only when it is needed, since some depend on large optional libraries."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from agents.protocol import Agent, AgentContext, Learner, ProblemLike
from compression.refusal import Refusal, nearest

__all__ = ["METHODS", "NAMES", "find", "make"]

#: Name -> "module:callable"; the callable makes an agent from (problem, context).
_AGENTS = {
    "bandit": "agents.bandit:Bandit",
    "evolution": "agents.evolution:Evolution",
    "gradient": "agents.gradient:Gradient",
    "knapsack": "agents.baselines:Knapsack",
    "lagrangian": "agents.baselines:Lagrangian",
    "optuna-cmaes": "agents.optuna_agents:cmaes",
    "optuna-gp": "agents.optuna_agents:gp",
    "optuna-nsga2": "agents.optuna_pareto:OptunaPareto",
    "optuna-qmc": "agents.optuna_agents:qmc",
    "optuna-tpe": "agents.optuna_agents:tpe",
    "ppo": "agents.ppo:Ppo",
    "ppo-masked": "agents.ppo:PpoMasked",
    "random": "agents.random_search:RandomSearch",
    "reinforce": "agents.reinforce:Reinforce",
    "uniform": "agents.baselines:Uniform",
}

NAMES: tuple[str, ...] = tuple(_AGENTS)

METHODS = {
    "reinforce": "log prices of sites, with slopes",
    "ppo": "levels of steps, with slopes and a trust region",
    "ppo-masked": "levels of steps, with slopes and a trust region",
}
"""What agents do that did something else under the same name in earlier versions; journals record it."""


def find(name: str) -> Callable[[ProblemLike, AgentContext], Agent]:
    """Returns the callable that makes the agent called `name`: one of `NAMES`, or a `module:Class` of your own.

    Raises:
        ValueError: the agent does not exist (the message gives the nearest name), its module or class cannot be found,
            or a package is not installed (the message gives the extra that installs it).
    """
    if name not in _AGENTS and ":" not in name:
        raise Refusal(f"agent must be one of {', '.join(NAMES)}, got {name!r}; nearest: {nearest(name, NAMES)}")
    module, _, maker = _AGENTS.get(name, name).partition(":")
    try:
        loaded = import_module(module)
    except ModuleNotFoundError as error:
        if name in _AGENTS:
            raise Refusal(
                f"agent {name} needs {error.name}, which is not installed: pip install 'chisel-prior[agents]'"
            ) from None
        raise Refusal(f"agent {name} cannot be imported: there is no module {error.name}") from None
    if not hasattr(loaded, maker):
        raise Refusal(f"agent {name} cannot be imported: {module} has no {maker}")
    found: Callable[[ProblemLike, AgentContext], Agent] = getattr(loaded, maker)
    return found


def make(name: str, problem: ProblemLike, context: AgentContext) -> Agent:
    """Makes the agent called `name` for `problem`.

    Raises:
        ValueError: see `find`; or the context holds a policy that this agent cannot continue.
    """
    agent = find(name)(problem, context)
    if context.policy is not None and not isinstance(agent, Learner):
        raise Refusal(f"agent {name} learns no policy and cannot continue one")
    return agent

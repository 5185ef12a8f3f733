"""Who proposes: agents that ask for schedules to be evaluated and are told rewards."""

from agents.fixed import Lagrangian, Uniform
from agents.protocol import Agent, Proposal, SlopeAgent, Task, Terms
from agents.random_search import RandomSearch
from agents.registry import NAMES, make
from agents.reinforce import Reinforce, ReinforceSettings

__all__ = [
    "NAMES",
    "Agent",
    "Lagrangian",
    "Proposal",
    "RandomSearch",
    "Reinforce",
    "ReinforceSettings",
    "SlopeAgent",
    "Task",
    "Terms",
    "Uniform",
    "make",
]

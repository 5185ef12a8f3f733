"""Who proposes: agents that ask for schedules to be evaluated and are told rewards."""

from agents.fixed import Knapsack, Lagrangian, Uniform
from agents.protocol import Agent, Proposal, Task, Terms
from agents.random_search import RandomSearch
from agents.registry import NAMES, make
from agents.reinforce import Reinforce, ReinforceSettings

__all__ = [
    "NAMES",
    "Agent",
    "Knapsack",
    "Lagrangian",
    "Proposal",
    "RandomSearch",
    "Reinforce",
    "ReinforceSettings",
    "Task",
    "Terms",
    "Uniform",
    "make",
]

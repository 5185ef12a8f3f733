"""Who proposes: agents that ask for schedules to be evaluated and are told rewards."""

from agents.fixed import Lagrangian, Uniform
from agents.policy_file import SavedPolicy
from agents.protocol import Agent, Learner, Proposal, Task, Terms
from agents.random_search import RandomSearch
from agents.registry import NAMES, make
from agents.reinforce import Reinforce, ReinforceSettings

__all__ = [
    "NAMES",
    "Agent",
    "Lagrangian",
    "Learner",
    "Proposal",
    "RandomSearch",
    "Reinforce",
    "ReinforceSettings",
    "SavedPolicy",
    "Task",
    "Terms",
    "Uniform",
    "make",
]

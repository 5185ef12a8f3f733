"""Who proposes: agents that ask for schedules to be evaluated and are told rewards."""

from agents.bandit import Bandit, BanditSettings
from agents.baselines import Knapsack, Lagrangian, Uniform
from agents.evolution import Evolution, EvolutionSettings
from agents.gradient import Gradient, GradientSettings
from agents.guided import Guided, GuidedSettings
from agents.policy_file import SavedPolicy
from agents.portfolio import Turns, TurnsSettings
from agents.protocol import SLOPES_COST, Agent, Learner, Proposal, SlopeAgent, Task, Terms
from agents.random_search import RandomSearch
from agents.registry import NAMES, find, make
from agents.reinforce import Reinforce, ReinforceSettings

__all__ = [
    "NAMES",
    "SLOPES_COST",
    "Agent",
    "Bandit",
    "BanditSettings",
    "Evolution",
    "EvolutionSettings",
    "Gradient",
    "GradientSettings",
    "Guided",
    "GuidedSettings",
    "Knapsack",
    "Lagrangian",
    "Learner",
    "Proposal",
    "RandomSearch",
    "Reinforce",
    "ReinforceSettings",
    "SavedPolicy",
    "SlopeAgent",
    "Task",
    "Terms",
    "Turns",
    "TurnsSettings",
    "Uniform",
    "find",
    "make",
]

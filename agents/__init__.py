"""The agents: they propose schedules to evaluate and learn from the rewards."""

from agents.bandit import Bandit, BanditSettings
from agents.baselines import Knapsack, Lagrangian, Uniform
from agents.evolution import Evolution, EvolutionSettings
from agents.gradient import Gradient, GradientSettings
from agents.policy_file import SavedPolicy
from agents.protocol import SLOPES_COST, Agent, AgentContext, Learner, ProblemLike, Proposal, SlopeAgent
from agents.random_search import RandomSearch
from agents.registry import METHODS, NAMES, find, make
from agents.reinforce import Reinforce, ReinforceSettings

__all__ = [
    "METHODS",
    "NAMES",
    "SLOPES_COST",
    "Agent",
    "AgentContext",
    "Bandit",
    "BanditSettings",
    "Evolution",
    "EvolutionSettings",
    "Gradient",
    "GradientSettings",
    "Knapsack",
    "Lagrangian",
    "Learner",
    "ProblemLike",
    "Proposal",
    "RandomSearch",
    "Reinforce",
    "ReinforceSettings",
    "SavedPolicy",
    "SlopeAgent",
    "Uniform",
    "find",
    "make",
]

"""The decision problem of a bond-dimension search: groups, ladder, projection, reward, Gymnasium environment."""

from gymnasium.envs.registration import register

from envs.bond_dimension import BondDimensionEnv
from envs.problem import GRANULARITIES, LEVELS, REACH, Group, Problem
from envs.reward import Reward, ScoreLike
from envs.toy import ToyEvaluator, ToyScore, best_by_exhaustion, toy_menu

__all__ = [
    "GRANULARITIES",
    "LEVELS",
    "REACH",
    "BondDimensionEnv",
    "Group",
    "Problem",
    "Reward",
    "ScoreLike",
    "ToyEvaluator",
    "ToyScore",
    "best_by_exhaustion",
    "toy_menu",
]

register(id="Chisel/BondDimension-v0", entry_point="envs.bond_dimension:BondDimensionEnv")

"""Defines the decision problem of a bond-dimension search and its Gymnasium environment."""

from gymnasium.envs.registration import register

from envs.bond_dimension import BondDimensionEnv
from envs.groups import GRANULARITIES, Group
from envs.problem import LEVELS, REACH, Problem
from envs.reward import Reward, ScoreLike
from envs.score_table import ScoreTable
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
    "ScoreTable",
    "ToyEvaluator",
    "ToyScore",
    "best_by_exhaustion",
    "toy_menu",
]

register(id="chisel/BondDimension-v0", entry_point="envs.bond_dimension:BondDimensionEnv")

"""The compression engine: MPO fits, metrics, menus, allocation, and applying a schedule to a torch model."""

from compression.allocation import lagrangian, to_schedule, uniform, uniform_schedule
from compression.apply import ScheduleApplier
from compression.cache import Bundle, FactorCache, cache_key
from compression.factors import Factors, FactorStore
from compression.fit import Fit, fit
from compression.gauge import PivotedCore, pivot, unpivot
from compression.heads import HeadLinear, split_heads_
from compression.knapsack import Allocation, knapsack
from compression.layers import MPOLinear
from compression.legs import Legs, balanced, resolve
from compression.menu import Menu, Option, SiteMenu, dense_menu, envelope, nested_options
from compression.mpo import contract, contract_with, decompose, truncate, truncation_error_bound
from compression.planner import Planned, Planner
from compression.schedule import DENSE, Choice, Schedule
from compression.sites import Site, check_weight, dense_weight, discover_sites, model_bytes, model_parameters
from compression.statistics import Statistics, collect
from compression.topologies import fitted_topologies
from compression.whitening import Whitening, shrink

__all__ = [
    "DENSE",
    "Allocation",
    "Bundle",
    "Choice",
    "FactorCache",
    "FactorStore",
    "Factors",
    "Fit",
    "HeadLinear",
    "Legs",
    "MPOLinear",
    "Menu",
    "Option",
    "PivotedCore",
    "Planned",
    "Planner",
    "Schedule",
    "ScheduleApplier",
    "Site",
    "SiteMenu",
    "Statistics",
    "Whitening",
    "balanced",
    "cache_key",
    "check_weight",
    "collect",
    "contract",
    "contract_with",
    "decompose",
    "dense_menu",
    "dense_weight",
    "discover_sites",
    "envelope",
    "fit",
    "fitted_topologies",
    "knapsack",
    "lagrangian",
    "model_bytes",
    "model_parameters",
    "nested_options",
    "pivot",
    "resolve",
    "shrink",
    "split_heads_",
    "to_schedule",
    "truncate",
    "truncation_error_bound",
    "uniform",
    "uniform_schedule",
    "unpivot",
]

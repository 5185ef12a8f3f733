"""The compression engine: MPO fits, metrics, menus, allocation, and applying a schedule to a torch model."""

from compression.allocation.closed_form import lagrangian, to_schedule, uniform, uniform_schedule
from compression.allocation.knapsack import Allocation, knapsack
from compression.allocation.menu import Menu, Option, SiteMenu, dense_menu, envelope, nested_options
from compression.allocation.topologies import fitted_topologies
from compression.calibration.statistics import Statistics, collect
from compression.decomposition.apply import ScheduleApplier
from compression.decomposition.factors import Factors, FactorStore
from compression.layers.heads import HeadLinear, split_heads_
from compression.layers.mpo_linear import MPOLinear
from compression.layers.planner import Planned, Planner
from compression.numerics.cores import contract, contract_with, decompose, truncate, truncation_error_bound
from compression.numerics.fit import Fit, fit
from compression.numerics.gauge import PivotedCore, pivot, unpivot
from compression.numerics.legs import Legs, balanced, resolve
from compression.numerics.whitening import Whitening, shrink
from compression.schedule import DENSE, Choice, Schedule
from compression.sites import Site, check_weight, dense_weight, discover_sites, model_bytes, model_parameters
from compression.storage.factor_cache import Bundle, FactorCache, cache_key

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

from .allocation.closed_form import lagrangian, to_schedule, uniform, uniform_schedule
from .allocation.knapsack import Allocation, knapsack
from .allocation.menu import Menu, Option, SiteMenu, dense_menu, envelope, nested_options
from .allocation.topologies import fitted_topologies
from .calibration.statistics import Statistics, collect
from .decomposition.apply import ScheduleApplier
from .decomposition.factors import Factors, FactorStore
from .decomposition.repair import repair_
from .layers.fused import FusedLinear, split_fused_
from .layers.heads import HeadLinear, split_heads_
from .layers.mpo_linear import MPOLinear
from .layers.planner import Planned, Planner
from .numerics.cores import contract, contract_with, decompose, truncate, truncation_error_bound
from .numerics.fit import Fit, fit
from .numerics.gauge import PivotedCore, pivot, unpivot
from .numerics.legs import Legs, balanced, resolve
from .numerics.whitening import Whitening, shrink
from .refusal import Refusal, nearest
from .schedule import DENSE, Choice, Schedule
from .sites import Site, check_weight, dense_weight, discover_sites, model_bytes, model_parameters
from .storage.factor_cache import Bundle, FactorCache, cache_key

__all__ = [
    "DENSE",
    "Allocation",
    "Bundle",
    "Choice",
    "FactorCache",
    "FactorStore",
    "Factors",
    "Fit",
    "FusedLinear",
    "HeadLinear",
    "Legs",
    "MPOLinear",
    "Menu",
    "Option",
    "PivotedCore",
    "Planned",
    "Planner",
    "Refusal",
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
    "nearest",
    "nested_options",
    "pivot",
    "repair_",
    "resolve",
    "shrink",
    "split_fused_",
    "split_heads_",
    "to_schedule",
    "truncate",
    "truncation_error_bound",
    "uniform",
    "uniform_schedule",
    "unpivot",
]

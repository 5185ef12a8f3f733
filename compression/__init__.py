"""The compression engine: MPO fits, metrics, menus, allocation, and applying a schedule to a torch model."""

from compression.allocation import lagrangian, to_schedule, uniform, uniform_schedule
from compression.apply import ScheduleApplier
from compression.cache import Bundle, FactorCache, cache_key
from compression.factors import Factors, FactorStore
from compression.layers import MPOLinear
from compression.legs import Legs, balanced, resolve
from compression.menu import Menu, SiteMenu, lowrank_menu
from compression.mpo import contract, contract_with, decompose, truncate, truncation_error_bound
from compression.planner import Planned, Planner
from compression.schedule import DENSE, Choice, Schedule
from compression.sites import Site, dense_weight, discover_sites, model_bytes, model_parameters
from compression.statistics import Statistics, collect
from compression.whitening import Whitening, shrink

__all__ = [
    "DENSE",
    "Bundle",
    "Choice",
    "FactorCache",
    "FactorStore",
    "Factors",
    "Legs",
    "MPOLinear",
    "Menu",
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
    "collect",
    "contract",
    "contract_with",
    "decompose",
    "dense_weight",
    "discover_sites",
    "lagrangian",
    "lowrank_menu",
    "model_bytes",
    "model_parameters",
    "resolve",
    "shrink",
    "to_schedule",
    "truncate",
    "truncation_error_bound",
    "uniform",
    "uniform_schedule",
]

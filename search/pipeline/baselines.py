"""The baseline schedules that every run is compared with."""

from __future__ import annotations

import math

from compression.allocation.closed_form import uniform_schedule
from compression.numerics.packed_size import FLOATING
from compression.schedule import DENSE, Choice, Schedule
from search.experiment.experiment import Experiment
from search.runtime.console import Console

__all__ = ["baseline_schedules"]


def baseline_schedules(experiment: Experiment, console: Console) -> dict[str, Schedule]:
    """Schedules of one χ everywhere at the target: plain sequential-SVD MPO, input-whitened and two-sided low rank.

    Where matrices may be rounded there is one more, of the same bits everywhere. A baseline that cannot reach the
    target with these shapes, such as an MPO of prime dimensions, is skipped with a note.
    """
    target = math.floor(experiment.budget.target_kept * sum(site.parameters for site in experiment.sites) + 1e-6)
    kinds = {
        "uniform-plain": ("mpo2", "plain"),
        "uniform-whitened": ("lowrank", "input"),
        "uniform": ("lowrank", "two-sided"),
    }
    baselines = {}
    for name, (topology, metric) in kinds.items():
        try:
            baselines[name] = uniform_schedule(experiment.sites, topology, metric, target)
        except ValueError as error:
            console.note(f"baseline {name} ({topology}, {metric}) is skipped: {error}")
    if (bits := _uniform_bits(experiment)) is not None:
        baselines["uniform-bits"] = bits
    return baselines


def _uniform_bits(experiment: Experiment) -> Schedule | None:
    """The most bits that all matrices can have, and the next more for the first of them, as many as the target allows.

    None if matrices are not rounded, or if the fewest bits are too many.
    """
    forms, price = experiment.budget.forms, experiment.budget.price
    offered = () if forms is None else sorted(bits for bits in forms.bits if bits != FLOATING)
    sites = [each for each in experiment.sites if not (each.dense_because or (forms and forms.leaves_out(each)))]
    room = experiment.budget.target_kept * sum(price(site, DENSE) for site in experiment.sites)
    room -= sum(price(site, DENSE) for site in experiment.sites if site not in sites)
    choices = [*(Choice("dense", 0, "two-sided", bits=bits) for bits in offered), DENSE]
    fitting = [number for number, each in enumerate(choices) if sum(price(site, each) for site in sites) <= room]
    if not offered or not fitting:
        return None
    chosen, more = choices[fitting[-1]], choices[min(fitting[-1] + 1, len(choices) - 1)]
    room -= sum(price(site, chosen) for site in sites)
    schedule = dict.fromkeys((site.name for site in experiment.sites), DENSE) | {site.name: chosen for site in sites}
    for site in sites:
        room -= price(site, more) - price(site, chosen)
        if room < 0:
            break
        schedule[site.name] = more
    return Schedule(tuple(schedule.items()))

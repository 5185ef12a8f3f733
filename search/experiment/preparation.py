"""What comes before the work of a command: refuse early, count what stays dense, collect the statistics.

Knows configurations, subjects and the cache; no run folder but whether one may be written to.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Sequence

from compression.sites import Site
from search.experiment.experiment import Experiment
from search.runtime.console import Console, Stage

__all__ = ["calibrate", "check_space", "stays_dense"]


def calibrate(experiment: Experiment, console: Console) -> None:
    """Collect the statistics, unless the cache has them."""
    calibration = experiment.calibration
    for name, part in (("calibrate", calibration.unweighted), ("weight tokens", calibration)):
        if calibration.cache.has(calibration.key):
            break
        with console.stage(name, experiment.config.calibration_tokens, "tokens") as stage:
            part.progress = _advancing(stage)
            part()


def _advancing(stage: Stage) -> Callable[[int], None]:
    """Turns how much is done in all into how much has come to it."""
    seen = 0

    def progress(done: int) -> None:
        nonlocal seen
        stage.advance(done - seen)
        seen = done

    return progress


def stays_dense(sites: Sequence[Site]) -> dict[str, str]:
    """Why, by name, of every site that cannot be tensorized."""
    return {site.name: site.dense_because for site in sites if site.dense_because}


def check_space(experiment: Experiment) -> None:
    """Refuse to start building a cache that the disk cannot hold: moments of two passes, three sets of factors."""
    cache = experiment.calibration.cache
    if cache.root is None or cache.has(experiment.calibration.key):
        return
    sites = [site for site in experiment.sites if not site.dense_because]
    moments = sum(site.out_features**2 + site.in_features**2 for site in sites)
    lowrank = sum(min(site.out_features, site.in_features) * (site.out_features + site.in_features) for site in sites)
    needed = 4 * (2 * moments + 2 * lowrank + sum(site.parameters for site in sites))
    cache.root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache.root).free
    if free < needed:
        text = f"the cache {cache.root} needs {needed / 1e6:,.1f} MB of disk and {free / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, text)

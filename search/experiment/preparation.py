"""Prepare the work of a command: check the disk space, list the sites that stay dense, collect the statistics.

Knows experiments and the cache; does not know run folders.
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
    """Collect the calibration statistics unless the cache has them."""
    calibration = experiment.calibration
    for name, part in (("calibrate", calibration.unweighted), ("weight tokens", calibration)):
        if calibration.cache.has(calibration.key):
            break
        with console.stage(name, experiment.config.calibration_tokens, "tokens") as stage:
            part.progress = _advancing(stage)
            part()


def _advancing(stage: Stage) -> Callable[[int], None]:
    """Convert cumulative counts into the increments that `stage.advance` expects."""
    seen = 0

    def progress(done: int) -> None:
        nonlocal seen
        stage.advance(done - seen)
        seen = done

    return progress


def stays_dense(sites: Sequence[Site]) -> dict[str, str]:
    """The reason why a site cannot be tensorized, by name, for all such sites."""
    return {site.name: site.dense_because for site in sites if site.dense_because}


def check_space(experiment: Experiment) -> None:
    """Check that the disk can hold the cache: the moments of two passes and three sets of factors.

    Raises:
        OSError: the free disk space is too small (ENOSPC).
    """
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

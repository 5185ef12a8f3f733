"""Prepare the work of a command: check the disk space, list the sites that stay dense, collect the statistics.

Knows experiments and the cache; does not know run folders.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Sequence

import torch

from compression.sites import Site, model_bytes
from search.experiment.experiment import Experiment
from search.experiment.needs import needs
from search.model.loading import LoadedModel
from search.runtime.console import Console, Stage
from search.runtime.memory import available_memory, give_back_memory

__all__ = ["advancing", "calibrate", "check_space", "stays_dense", "stays_on_disk"]


def calibrate(experiment: Experiment, console: Console) -> None:
    """Collect the calibration statistics unless the cache has them; later stages show what they decompose."""
    calibration, experiment.store.progress = experiment.calibration, console.decomposed
    for name, part in calibration.parts:
        if calibration.is_cached:
            break
        if part.is_cached:
            continue
        done = part.tokens_done
        if done:
            console.note(f"{name}: {done} tokens of an interrupted run are continued")
        with console.stage(name, experiment.config.calibration_tokens, "tokens", done) as stage:
            part.progress = advancing(stage, done)
            part()


def advancing(stage: Stage, seen: int = 0) -> Callable[[int], None]:
    """A function that takes cumulative counts, `seen` at first, and gives `stage.advance` their increments.

    Memory that the work before has freed goes back to the system.
    """

    def progress(done: int) -> None:
        nonlocal seen
        stage.advance(done - seen)
        seen = done
        give_back_memory()

    return progress


def stays_dense(sites: Sequence[Site]) -> dict[str, str]:
    """The reason why a site cannot be tensorized, by name, for all such sites."""
    return {site.name: site.dense_because for site in sites if site.dense_because}


def stays_on_disk(loaded: LoadedModel) -> str:
    """A line that says why the weights of a model are read from disk again and again; empty if they are not."""
    size, available = model_bytes(loaded.model), available_memory()
    if not loaded.is_mapped or available is None or size <= available:
        return ""
    return (
        f"the model takes {size / 1e9:.1f} GB and {available / 1e9:.1f} GB of memory are available: its weights stay "
        "on disk and are read block by block, which takes longer"
    )


def check_space(experiment: Experiment, note: Callable[[str], None]) -> None:
    """Check that the disk can hold the cache, and note if the memory seems too small.

    Args:
        note: called with one line.

    Raises:
        OSError: the free disk space is too small (ENOSPC).
    """
    calibration = experiment.calibration
    if calibration.cache.root is None or calibration.is_cached:
        return
    stages = needs(experiment)
    disk, hungriest = max(need.disk for need in stages), max(stages, key=lambda need: need.memory)
    available = available_memory()
    on_disk = model_bytes(experiment.loaded.model) if experiment.loaded.is_mapped else 0
    if available is not None and experiment.device.type == "cpu" and hungriest.memory - on_disk > available:
        smaller = "; --dtype bfloat16 halves the model" if experiment.loaded.model.dtype == torch.float32 else ""
        note(
            f"stage {hungriest.stage} takes about {hungriest.memory / 1e9:.1f} GB of memory, and "
            f"{available / 1e9:.1f} GB are available{smaller}"
        )
    calibration.cache.root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(calibration.cache.root).free
    if free < disk:
        text = (
            f"the cache {calibration.cache.root} needs {disk / 1e6:,.1f} MB of disk and {free / 1e6:,.1f} MB are free; "
            "free some, or name a folder on another disk in CHISEL_CACHE"
        )
        raise OSError(errno.ENOSPC, text)

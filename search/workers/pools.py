"""Opens the pool of evaluators that a configuration asks for: one in this process, or several in other processes.

Sets what Ray reads at import time. Otherwise independent of Ray.
"""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from compression.refusal import Refusal
from compression.schedule import Schedule
from search.config import Config
from search.evaluation.pool import Pool, SerialPool
from search.experiment.experiment import Experiment, Extract
from search.runtime.console import Console

__all__ = ["check_evaluators", "search_pool", "shown_search_pool"]

_ANSWER_SECONDS = 5.0  # after which a cluster counts as unreachable


def check_evaluators(config: Config) -> None:
    """Refuse evaluators in other processes if ray is not installed or its cluster cannot be reached.

    Raises:
        ValueError: names the flag, and the extra that installs ray or the address.
    """
    if config.in_process:
        return
    if importlib.util.find_spec("ray") is not None:
        if config.ray_address not in (None, "auto"):
            _refuse_silent(config.ray_address)
        return
    asked = "ray_address" if config.ray_address else "trial_timeout" if config.trial_timeout else "evaluators"
    flag = asked.replace("_", "-")
    raise Refusal(f"--{flag} needs ray, which is not installed: pip install 'chisel-prior[cluster]'")


def _refuse_silent(address: str) -> None:
    host, _, port = address.partition(":")
    try:
        socket.create_connection((host, int(port or 6379)), _ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Refusal(f"ray_address {address!r} cannot be used: {reason}") from None


@contextmanager
def search_pool(
    experiment: Experiment,
    anchor: Schedule,
    note: Callable[[str], None],
    extract: Extract | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Iterator[Pool]:
    """The pool that scores the trials of `experiment`; its statistics and factors must be in the cache.

    Args:
        anchor: see `search.evaluation.evaluator.ModelEvaluator`.
        note: shows one line to the user.
        extract: data to score on instead of the shards of the search data.
        progress: called after each of `Experiment.references` passes; not called if evaluators are in other processes.

    Raises:
        ValueError: the cluster cannot be reached or has no room, or an evaluator has another model or other data.
    """
    if experiment.config.in_process:
        with experiment.evaluator("search", anchor, extract, progress=progress) as evaluator:
            yield SerialPool(evaluator, evaluator.dense)
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from search.workers.ray_pool import ray_pool

    with ray_pool(experiment, anchor, note, extract) as pool:
        yield pool


@contextmanager
def shown_search_pool(experiment: Experiment, anchor: Schedule, console: Console) -> Iterator[Pool]:
    """The pool of `search_pool`; shows the passes that it makes before the first trial as the stage "reference"."""
    with ExitStack() as opened:
        with console.stage("reference", experiment.references(anchor), "passes") as stage:
            pool = opened.enter_context(
                search_pool(experiment, anchor, console.note, progress=lambda: stage.advance(1))
            )
        yield pool

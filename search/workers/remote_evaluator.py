"""Node: what an evaluator in a process of its own sets up on its machine, from a configuration and nothing else.

The model's parameters are written to the cache once on every machine and memory-mapped by all of its evaluators, as the
factors are, so one more evaluator costs little memory. What is missing is made by whoever comes first, behind a lock.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from compression.schedule import Schedule
from compression.storage.factor_cache import Bundle, FactorCache, cache_key
from search.config import EVALUATORS, Config
from search.evaluation.evaluator import REUSE_BYTES, ModelEvaluator
from search.evaluation.pool import Job, measure
from search.experiment.experiment import Experiment, Extract, load
from search.model.devices import resolve_device, working_dtype
from search.model.loading import LoadedModel, assemble, can_be_assembled, load_model
from search.runtime.files import cache_folder

__all__ = ["RemoteEvaluator", "portable_fields", "shared_model"]


def portable_fields(config: Config) -> dict[str, Any]:
    """Field values from which another process, in another folder, builds the evaluator of this configuration.

    Time is measured by whoever reads the scores, so that all are measured on one machine.
    """
    own = {"policy", "prior", "out", "resume", "quick", *EVALUATORS}
    values = config.model_dump(exclude=own) | {"latency_weight": 0.0}
    for name in ("model", "proxy"):
        if Path(path := str(values[name])).expanduser().exists():
            values[name] = str(Path(path).expanduser().absolute())
    return values


class RemoteEvaluator:
    """An evaluator of trials and all it needs.

    Args:
        values: from `portable_fields`.
        anchor: see `search.evaluation.evaluator.ModelEvaluator`.
        digest: of the model's parameters; under another one they are not shared, and the caller will refuse.
        sharers: evaluators that share this machine's memory for hidden states, about.
        extract: see `search.workers.pools.search_pool`.
    """

    def __init__(
        self, values: dict[str, Any], anchor: Schedule, digest: str, sharers: int = 1, extract: Extract | None = None
    ) -> None:
        config = Config.of(values)
        device = resolve_device(config.device)
        cache = FactorCache(cache_folder() / "factors")
        lock = FileLock(cache_folder() / "evaluators.lock")
        with lock:
            dtype = working_dtype(config.dtype, device)
            loaded = None if config.per_head else shared_model(config.model, device, dtype, digest, cache)
        loaded, sites = load(config, device, loaded)
        self.experiment = Experiment.of(config, loaded, sites, device)
        with lock:
            self.experiment.store.menu()
            self.experiment.calibration.release()
        self._open = ExitStack()
        self.evaluator: ModelEvaluator = self._open.enter_context(
            self.experiment.evaluator("search", anchor, extract, REUSE_BYTES // sharers)
        )

    def work(self, job: str) -> str:
        """Carry out a `Job` in JSON; returns the `Result`."""
        return measure(self.evaluator, Job.from_json(job)).to_json()


def shared_model(
    name: str, device: torch.device, dtype: torch.dtype, digest: str, cache: FactorCache
) -> LoadedModel | None:
    """The model around parameters in the cache, which are put there if they are not; None where it is another one."""
    if not can_be_assembled(name):
        return None
    key = cache_key(kind="parameters", format=1, model=digest)
    bundle = cache.load(key)
    if bundle is None:
        loaded = load_model(name, device, dtype)
        if loaded.digest != digest:
            return loaded
        cache.store(key, Bundle({name: values.detach().cpu() for name, values in loaded.model.named_parameters()}))
        del loaded
        bundle = cache.load(key)
        assert bundle is not None
    return assemble(name, device, bundle.tensors, digest)

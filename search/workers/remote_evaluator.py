"""An evaluator in another process, which sets everything up on its machine from a configuration.

The model's parameters are written to the cache once per machine and memory-mapped by all evaluators there, like the
factors, so that one more evaluator costs little memory. The first evaluator creates what is missing, behind a lock.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from filelock import FileLock

from compression.refusal import Refusal
from compression.schedule import Schedule
from compression.storage.factor_cache import Bundle, FactorCache, cache_key
from search.config import EVALUATORS, Config
from search.evaluation.evaluator import REUSE_BYTES, ModelEvaluator
from search.evaluation.pool import Job, measure
from search.experiment.experiment import Experiment, Extract
from search.experiment.open_model import open_model
from search.experiment.user_files import check_files
from search.model.devices import resolve_device, working_dtype
from search.model.loading import LoadedModel, assemble, can_be_assembled, load_model
from search.runtime.files import cache_folder

__all__ = ["RemoteEvaluator", "portable_fields", "shared_model"]


def portable_fields(config: Config) -> dict[str, Any]:
    """Field values from which a process in another folder builds the evaluator of this configuration.

    They leave out the latency weight: latency is measured by the process that reads the scores, on one machine for all.
    """
    own = {"policy", "prior", "out", "resume", "quick", *EVALUATORS}
    return config.model_dump(exclude=own) | {"latency_weight": 0.0}


class RemoteEvaluator:
    """An evaluator of trials with its model and data.

    Args:
        values: from `portable_fields`.
        anchor: see `search.evaluation.evaluator.ModelEvaluator`.
        model: `LoadedModel.identity` of the run's model.
        sharers: approximate number of evaluators that share this machine's memory for hidden states.
        extract: see `search.workers.pools.search_pool`.

    Raises:
        Refusal: the model is another one here than in the run.
    """

    def __init__(
        self,
        values: dict[str, Any],
        anchor: Schedule,
        model: Mapping[str, str],
        sharers: int = 1,
        extract: Extract | None = None,
    ) -> None:
        config = Config.of(values)
        check_files(config)
        device = resolve_device(config.device)
        cache = FactorCache(cache_folder() / "factors")
        lock = FileLock(cache_folder() / "evaluators.lock")
        with lock:
            dtype = working_dtype(config.dtype, device)
            loaded = (
                None
                if config.per_head or config.split_fused
                else shared_model(config.model, device, dtype, model["weights"], cache, config.trust_remote_code)
            )
        loaded, sites = open_model(config, device, loaded)
        if different := [part for part, digest in model.items() if loaded.identity[part] != digest]:
            raise Refusal(
                f"the model {config.model} has other {' and '.join(different)} on {socket.gethostname()} than in the "
                "run; all evaluators need the same files, and these must not change during a run"
            )
        self.experiment = Experiment.of(config, loaded, sites, device)
        with lock:
            self.experiment.store.menu(
                form=config.form,
                multiple=config.width_multiple,
                price=self.experiment.budget.price,
                factored=config.has_factors,
            )
            self.experiment.calibration.release()
        self._open = ExitStack()
        self.evaluator: ModelEvaluator = self._open.enter_context(
            self.experiment.evaluator("search", anchor, extract, REUSE_BYTES // sharers)
        )

    def work(self, job: str) -> str:
        """Evaluate a `Job` given as JSON; returns the `Result` as JSON."""
        return measure(self.evaluator, Job.from_json(job)).to_json()


def shared_model(
    name: str, device: torch.device, dtype: torch.dtype, digest: str, cache: FactorCache, trusted: bool = False
) -> LoadedModel | None:
    """The model with memory-mapped parameters from the cache, which are stored there first if they are missing.

    Returns:
        None if the model cannot be assembled from parameters; an unshared model if its digest differs.
    """
    if not can_be_assembled(name):
        return None
    key = cache_key(kind="parameters", format=1, model=digest)
    bundle = cache.load(key)
    if bundle is None:
        loaded = load_model(name, device, dtype, trusted)
        if loaded.digest != digest:
            return loaded
        cache.store(key, Bundle({name: values.detach().cpu() for name, values in loaded.model.named_parameters()}))
        del loaded
        bundle = cache.load(key)
        assert bundle is not None
    return assemble(name, device, bundle.tensors, digest, trusted)

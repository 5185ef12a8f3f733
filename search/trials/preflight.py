"""Checks the configuration against files, devices and extras before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import torch

import agents
from compression.refusal import Refusal
from search.config import Config
from search.data.datasets import load_proxy
from search.data.own_text import read_own_text
from search.data.prompts import forms
from search.experiment.user_files import with_digests
from search.model.devices import resolve_device, working_dtype
from search.runtime.run_folder import RESULTS, STUDY, refuse_held, refuse_unwritable, refuse_used
from search.trials.journal import stored_fingerprint
from search.trials.setup import refuse_lost_trials
from search.trials.starting_point import StartingPoint
from search.workers.pools import check_evaluators

__all__ = ["preflight"]


def preflight(config: Config) -> tuple[Config, torch.device, StartingPoint]:
    """Refuse everything that can be refused before anything is loaded.

    Returns:
        The configuration with "auto" replaced by a data type (that of the resumed run, otherwise this machine's) and
        with the digests of the user's files, the device to run on, and the starting point of the search.
    """
    if config.proxy_form not in forms(config.proxy):
        raise Refusal(
            f"proxy_form must be {' or '.join(forms(config.proxy))} for {config.proxy}, got {config.proxy_form!r}"
        )
    if config.proxy.endswith(".jsonl"):
        load_proxy(config.proxy)
    if config.calibration is not None:
        read_own_text(config.calibration)
    agents.find(config.agent)
    start = StartingPoint.read(config)
    check_evaluators(config)
    if config.resume is not None:
        refuse_unwritable(Path(config.resume))
        refuse_held(Path(config.resume))
        refuse_lost_trials(Path(config.resume) / STUDY)
    elif config.out is not None:
        refuse_used(Path(config.out))
    else:
        refuse_unwritable(RESULTS)
    config = with_digests(config)
    device = resolve_device(config.device)
    wanted = config.gpus_per_evaluator if device.type == "cuda" and config.ray_address is None else None
    if wanted and wanted > (here := torch.cuda.device_count()):
        raise Refusal(f"gpus_per_evaluator must be at most the {here} GPUs of this machine, got {wanted}")
    if config.dtype != "auto":
        return config, device, start
    stored = stored_fingerprint(Path(config.resume) / STUDY) if config.resume is not None else None
    dtype = str(stored["dtype"] if stored else working_dtype("auto", device)).removeprefix("torch.")
    return Config.of({**config.model_dump(), "dtype": dtype}), device, start

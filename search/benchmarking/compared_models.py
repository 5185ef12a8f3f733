"""Turn the model names on a command line into models, loaded one at a time.

Knows model names, run folders and priors; does not know tasks. The schedules of a run are put into the dense model in
place, as for the final table of the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compression.allocation.closed_form import uniform_schedule
from compression.decomposition.apply import ScheduleApplier
from compression.refusal import Refusal, nearest
from compression.schedule import Schedule
from compression.sites import put_modules, replaced
from envs import Problem
from search.config import EXPORTS, Config, read_fields
from search.experiment.experiment import Experiment
from search.experiment.open_model import open_model
from search.experiment.preparation import calibrate
from search.experiment.repairing import repaired_, unfinished_repair
from search.healing.repaired_start import stored_repair
from search.healing.state import HEALED, REPAIRED, STATE, StoredWeights
from search.model.devices import working_dtype
from search.model.loading import LoadedModel, load_for_use, load_model, model_digest
from search.model.own_code import is_compressed, is_model_folder, refuse_own_code
from search.priors.format import Prior
from search.priors.same_model import refuse_other_model
from search.runtime.console import Console
from search.runtime.files import user_path
from search.runtime.run_digest import refuse_changed
from search.runtime.run_folder import CONFIG, PRIOR, STUDY

__all__ = ["SCHEDULES", "ComparedModel", "compared_models"]

SCHEDULES = ("dense", "uniform", "lagrangian", "searched", "repaired", "healed")
"""The models of a run: the dense model; uniform χ, the closed form and the searched schedule, all at the target of the
run; and the searched schedule repaired block by block, and healed."""


@dataclass(frozen=True)
class ComparedModel:
    """The models that one word on the command line stands for.

    Attributes:
        word: the word as given.
        names: names of its models, in the order in which `models` yields them.
        searched: digests of the items that its search used.
        models: yields the models; each is valid only until the next one is requested.
    """

    word: str
    names: tuple[str, ...]
    searched: frozenset[str]
    models: Callable[[], Iterator[LoadedModel]]


def compared_models(
    words: Sequence[str],
    schedules: Sequence[str],
    device: torch.device,
    console: Console,
    opened: Experiment | None = None,
    spread: bool = True,
    trusted: bool = False,
) -> list[ComparedModel]:
    """Find the models that the words stand for, without loading them.

    Args:
        words: each word is a run folder, the JSON file of a prior, or a model name as for
            `search.model.sources.locate`.
        schedules: which of `SCHEDULES` to measure for each run or prior.
        opened: the experiment of the run, with its dense model, if it is already in memory.
        spread: whether a run that spread its model over several devices does so again; otherwise `device` has all.
        trusted: whether the code that comes with a model may run.

    Raises:
        ValueError: a schedule is unknown, a run or prior unreadable, a run was changed since it finished, or two models
            have the same name. Later, `ComparedModel.models` refuses a model that is not the one of its run or prior.
    """
    for name in schedules:
        if name not in SCHEDULES:
            raise Refusal(
                f"each schedule must be one of {', '.join(SCHEDULES)}, got {name!r}; the nearest is "
                f"{nearest(name, SCHEDULES)}"
            )
    ordered = tuple(name for name in SCHEDULES if name in schedules)
    found = [_compared_model(word, ordered, device, console, len(words) > 1, opened, spread, trusted) for word in words]
    names = [name for one in found for name in one.names]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise Refusal(f"models must have different names, but two are named {twice[0]!r}")
    return found


def _compared_model(
    word: str,
    schedules: Sequence[str],
    device: torch.device,
    console: Console,
    several: bool,
    opened: Experiment | None,
    spread: bool,
    trusted: bool,
) -> ComparedModel:
    path = user_path(word)
    exported = is_model_folder(path)
    if not exported and (path / CONFIG).is_file() and (path / PRIOR).is_file():
        recorded = refuse_changed(path, console.note)
        prior, config = Prior.read(path / PRIOR), _config(read_fields(path / CONFIG), spread, trusted)
    elif path.suffix == ".json" and path.is_file():
        prior = Prior.read(path)
        config, recorded = _config(prior.configuration, spread, trusted), {}
    else:
        if path.is_dir() and (path / STUDY).exists():
            raise Refusal(f"the run {word!r} is not finished, it has no {PRIOR}; continue it with --resume")
        searched = frozenset(Prior.read(path / PRIOR).data.search_items) if (path / PRIOR).is_file() else frozenset()

        if path.is_dir() and not trusted:
            refuse_own_code(word, path)

        def plain() -> Iterator[LoadedModel]:
            if is_compressed(path):
                yield load_for_use(word, device, trusted)
            else:
                yield load_model(word, device, working_dtype("auto", device), trusted)

        # Exported folders of several runs have the same name.
        name = f"{path.absolute().parent.name}/{path.name}" if path.name in EXPORTS else path.name or word
        return ComparedModel(word, (name,), searched, plain)
    if not prior.was_repaired:
        schedules = [name for name in schedules if name != "repaired"]
    if not (path / HEALED / STATE).is_file():
        schedules = [name for name in schedules if name != "healed"]
    label = f"{path.stem}:" if several else ""
    names = tuple(f"{label}{name}" for name in schedules)
    run = _Run(config, prior, schedules, path, device, console, opened, recorded)
    return ComparedModel(word, names, frozenset(prior.data.search_items), run.models)


@dataclass(frozen=True)
class _Run:
    """The models of a run or a prior."""

    config: Config
    prior: Prior
    schedules: Sequence[str]
    folder: Path
    device: torch.device
    console: Console
    opened: Experiment | None
    recorded: Mapping[str, str]

    def models(self) -> Iterator[LoadedModel]:
        """Yield the schedules one after the other, all on one model in memory that is dense in between."""
        if self.opened is None:
            with self.console.stage("load"):
                loaded, sites = open_model(self.config, self.device)
        else:
            loaded, sites = self.opened.loaded, self.opened.sites
        refuse_other_model(self.prior, loaded, self.folder, self.console.note, self.recorded)
        if set(self.schedules) <= {"dense"}:
            yield from [loaded] * len(self.schedules)
            return
        experiment = self.opened or Experiment.of(self.config, loaded, sites, self.device, self.console.note)
        calibrate(experiment, self.console)
        ends = experiment.stored_ends()
        for name in self.schedules:
            if name == "repaired":
                yield from self._repaired(experiment, ends)
            elif name == "healed":
                yield from self._healed(experiment, ends)
            else:
                with ScheduleApplier(loaded.model, experiment.store, packed=True) as applier:
                    applier.apply_(self._schedule(name, experiment))
                    yield from _as_is(loaded, {} if name == "dense" else ends)

    def _schedule(self, name: str, experiment: Experiment) -> Schedule:
        target = experiment.budget.target_kept
        if name == "dense":
            return Schedule.dense(tuple(site.name for site in experiment.sites))
        if name == "uniform":
            parameters = int(target * sum(site.parameters for site in experiment.sites) + 1e-6)
            return uniform_schedule(experiment.sites, "lowrank", "two-sided", parameters)
        if name == "lagrangian":
            return Problem.build(experiment.menu(), target, self.config.granularity).closed_form()
        return self.prior.schedule

    def _repaired(self, experiment: Experiment, ends: Mapping[str, nn.Module]) -> Iterator[LoadedModel]:
        schedule = self.prior.schedule
        if (stored := stored_repair(self.folder / REPAIRED, experiment, schedule)) is not None:
            yield from self._stored(experiment, stored, ends)
            return
        taken = repaired_(experiment, schedule, self.console)
        unfinished_repair(experiment, schedule).drop()
        experiment.calibration.release()
        try:
            yield from _as_is(experiment.loaded, ends)
        finally:
            put_modules(experiment.loaded.model, taken)

    def _healed(self, experiment: Experiment, ends: Mapping[str, nn.Module]) -> Iterator[LoadedModel]:
        kept = StoredWeights.read(self.folder / HEALED)
        kept.check(self.prior.schedule, self.prior.model.digest)
        yield from self._stored(experiment, kept, ends)

    def _stored(
        self, experiment: Experiment, stored: StoredWeights, ends: Mapping[str, nn.Module]
    ) -> Iterator[LoadedModel]:
        undo = stored.put_(experiment.loaded.model, experiment.sites, self.prior.schedule)
        try:
            yield from _as_is(experiment.loaded, ends)
        finally:
            undo()


def _as_is(loaded: LoadedModel, ends: Mapping[str, nn.Module]) -> Iterator[LoadedModel]:
    """Yield the model in its present state but for its ends, with the digest of its parameters."""
    with replaced(loaded.model, ends):
        yield dataclasses.replace(loaded, digest=model_digest(loaded.model))


def _config(values: Mapping[str, Any], spread: bool, trusted: bool) -> Config:
    """The configuration of a run without the fields that a benchmark does not need."""
    without = ("policy", "out", "resume", *(() if spread else ("device_map",)))
    return Config.of_run({name: value for name, value in values.items() if name not in without}, trusted)

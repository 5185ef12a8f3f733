"""Makes the agent, the reward and the journal of a search, and checks that a resumed search is the same one."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import agents
from agents import Agent
from compression.refusal import Refusal
from envs import Problem, Reward
from search.config import EARLIER, Config
from search.evaluation.score import Score
from search.experiment.experiment import Experiment
from search.reporting.frames import csv_text, read_records
from search.runtime.files import write_whole
from search.runtime.run_folder import ENVIRONMENT, TRIALS
from search.trials.journal import Journal, refuse_another, stored_fingerprint, stored_trials
from search.trials.starting_point import StartingPoint

__all__ = [
    "fingerprint",
    "fingerprint_defaults",
    "make_agent",
    "open_journal",
    "refuse_earlier_agent",
    "refuse_lost_trials",
    "refuse_other_search",
    "reward_of",
]


def reward_of(config: Config, dense: Score) -> Reward:
    """The reward of a configuration, given the dense model's score on the search data.

    P(correct) has no weight if the search data have no questions with choices, as for a masked language model.
    """
    if not dense.quality.items:
        return replace(_weighted(config), correct_weight=0.0)
    return replace(_weighted(config), dense_expected_accuracy=dense.expected_accuracy)


def fingerprint(config: Config, experiment: Experiment, start: StartingPoint) -> dict[str, object]:
    """Everything that determines the trials and their scores; a resumed search must have the same."""
    return {
        "configuration": config.definition(),
        **experiment.identity,
        "reward": dataclasses.asdict(_weighted(config)),
        **start.identity(),
    }


def _method(config: Config) -> dict[str, object]:
    """What the journals of an agent record that did something else in earlier versions."""
    return {"method": agents.METHODS[config.agent]} if config.agent in agents.METHODS else {}


def open_journal(path: Path, config: Config, experiment: Experiment, problem: Problem, start: StartingPoint) -> Journal:
    """Open the journal of a search by `config.agent`; raises ValueError as `Journal` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    refuse_lost_trials(path)
    refuse_earlier_agent(path, config)
    own = fingerprint(config, experiment, start) | _method(config)
    journal = Journal(path, own, problem.names, problem.levels, fingerprint_defaults())
    if not (table := path.with_name(TRIALS)).exists():  # from here on, `refuse_lost_trials` knows of the journal
        write_whole(table, csv_text(journal.rows()))
    return journal


def refuse_lost_trials(path: Path) -> None:
    """Refuse a journal that is absent, empty or older than the table of trials beside it.

    Such a search would silently begin anew.

    Raises:
        Refusal: trials are missing.
        OSError: as `search.trials.journal.stored_fingerprint`.
    """
    table = path.with_name(TRIALS)
    if not table.is_file():
        return  # no search has begun here, or an earlier version began it
    found, known = stored_trials(path), len(read_records(table))
    if stored_fingerprint(path) is None or found < known:
        raise Refusal(
            f"{path} has lost trials: it holds {found}, and {table.name} beside it says that the search has begun and "
            f"had at least {known}; put back a copy of the journal, or start a new run"
        )


def refuse_other_search(path: Path, config: Config, experiment: Experiment, start: StartingPoint) -> None:
    """Refuse to continue the journal of another search before anything is computed; raises ValueError as `Journal`."""
    refuse_earlier_agent(path, config)
    refuse_another(path, fingerprint(config, experiment, start) | _method(config), fingerprint_defaults())


def refuse_earlier_agent(path: Path, config: Config) -> None:
    """Refuse to continue the journal of an agent that had the same name in an earlier version and worked differently.

    Raises:
        Refusal: `config.agent` would not make the trials of the journal again.
        OSError: as `search.trials.journal.stored_fingerprint`.
    """
    stored = stored_fingerprint(path)
    if stored is not None and stored.get("method") != _method(config).get("method"):
        raise Refusal(
            f"{path} was searched by an earlier agent of the name {config.agent}, which this version cannot continue; "
            f"start a new search, or continue with the version in {path.with_name(ENVIRONMENT)}"
        )


def fingerprint_defaults() -> dict[str, object]:
    """Values of the fields that fingerprints of earlier versions lack: their runs behaved as with these."""
    names = Config.of({}).definition()
    return {
        "configuration": {name: EARLIER.get(name, Config.model_fields[name].default) for name in names},
        "reward": dataclasses.asdict(Reward()),
        "kl_counts": "instructions of items too",
    }


def make_agent(config: Config, problem: Problem, experiment: Experiment, start: StartingPoint) -> Agent:
    """Make `config.agent` for `problem`; raises ValueError as `agents.make` does."""
    context = agents.AgentContext(
        config.seed,
        config.budget,
        experiment.search_shards,
        config.compression_weight,
        model=experiment.loaded.digest,
        policy=start.policy,
    )
    return agents.make(config.agent, problem, context)


def _weighted(config: Config) -> Reward:
    """The weights of a configuration. A run by bytes rewards what it counts: saved bytes instead of parameters."""
    weights = ("kl_weight", "correct_weight", "compression_weight", "bytes_weight", "latency_weight")
    reward = Reward(**{name: getattr(config, name) for name in weights})
    if not config.by_bytes:
        return reward
    return replace(reward, compression_weight=0.0, bytes_weight=reward.bytes_weight + reward.compression_weight)

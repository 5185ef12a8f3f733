"""The journal of a search: an Optuna study in one SQLite file that one process writes. It is the record of a run.

Every record is one transaction, so a killed run leaves only whole trials. Knows only plain values: digests, JSON text,
numbers and states. optuna-dashboard opens the file.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import optuna
from optuna.distributions import IntDistribution, distribution_to_json
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from compression.refusal import Refusal
from search.runtime.files import finite
from search.runtime.signals import shield
from search.trials.fingerprints import differences, plain_values, with_defaults, with_later

__all__ = ["Journal", "Record", "refuse_another", "stored_fingerprint"]

_STUDY = "chisel"
_SPACE = ("steps", "levels")  # parts of a fingerprint that are known only after the model is decomposed
_DISK = {"FULL": errno.ENOSPC, "IOERR": errno.EIO, "READONLY": errno.EROFS}
_COLUMNS = {
    "trials": ("number", "study_id", "state", "datetime_start", "datetime_complete"),
    "trial_values": ("trial_id", "objective", "value", "value_type"),
    "trial_params": ("trial_id", "param_name", "param_value", "distribution_json"),
    "trial_user_attributes": ("trial_id", "key", "value_json"),
}


@dataclass(frozen=True)
class Record:
    """One evaluation of one schedule.

    Attributes:
        number: position in the order of proposals, from 0.
        digest: identity of the schedule.
        schedule: the schedule as canonical JSON.
        actions: levels the agent chose, one for every step, in the order of the journal's `steps`; None for an agent
            without steps.
        score: measured figures by name; empty if there are none. None stands for a number that was not finite.
        reward: the reward that the agent received; None unless `state` is "ok".
        state: "ok", "nonfinite" or "failed".
        reason: why the trial has no score, unless `state` is "ok".
        seconds: wall time of the evaluation.
        repeat: selects the shard that the schedule was scored on, see `agents.Proposal.repeat`.
        slopes: by site, in nats per token; None if the agent did not ask for them.
        asked: number of calls of `ask` before the agent was told this result.
    """

    number: int
    digest: str
    schedule: str
    actions: tuple[int, ...] | None
    score: Mapping[str, object]
    reward: float | None
    state: str
    reason: str = ""
    seconds: float = 0.0
    repeat: int = 0
    slopes: Mapping[str, float] | None = None
    asked: int = 0

    @property
    def key(self) -> tuple[str, int]:
        """The schedule and the shard that were evaluated."""
        return self.digest, self.repeat


class Journal:
    """Trials of one run, kept in `path`.

    Args:
        path: the SQLite file; it is created if absent.
        fingerprint: plain JSON values that define the search (space, data, model, reward, seed, agent). They are stored
            once; a journal with another fingerprint is refused.
        steps: a name for every decision of the agent, as the dashboard shows it ("block_07").
        levels: number of levels of each decision, at least 1.
        defaults: values for fields that a stored fingerprint lacks, see `with_defaults`.

    Raises:
        ValueError: the file has another fingerprint (the message lists the differences) or is not a journal.
        OSError: the disk is full or fails.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: Mapping[str, object],
        steps: Sequence[str] = (),
        levels: int = 1,
        defaults: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        self.path = path
        self.steps = tuple(steps)
        self._levels = levels
        self._distribution = distribution_to_json(IntDistribution(0, levels - 1))
        plain = plain_values({**fingerprint, "steps": list(steps), "levels": levels})
        refuse_another(path, plain, defaults)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with _disk(path):
            self._storage = RDBStorage("sqlite://", engine_kwargs=_engine(path))
            self._study = optuna.create_study(
                study_name=_STUDY, storage=self._storage, direction="maximize", load_if_exists=True
            )
            if "fingerprint" not in self._study.user_attrs:
                self._study.set_user_attr("fingerprint", plain)
        self._records = {record.number: record for record in map(self._read, self._study.get_trials(deepcopy=False))}

    @property
    def records(self) -> Sequence[Record]:
        """All records in the order of their numbers."""
        return [self._records[number] for number in sorted(self._records)]

    @property
    def told(self) -> Sequence[Record]:
        """All records in the order in which results arrived and the agent was told."""
        return list(self._records.values())

    def record(self, record: Record) -> None:
        """Store one trial; it is on disk when this returns. A stored trial is never changed.

        Raises:
            ValueError: the number belongs to another schedule, an "ok" record has no reward or another record has one,
                or the actions do not fit the steps.
            OSError: the disk is full or fails; the trial is not stored.
        """
        kept = self._records.get(record.number)
        if kept is not None and kept.key != record.key:
            was, now = (f"schedule {one.digest[:12]}, repeat {one.repeat}," for one in (kept, record))
            raise Refusal(
                f"trial {record.number} of {self.path} is {was} but the resumed search proposes {now} "
                "so code, seed or machine differ"
            )
        if kept is not None:
            return
        rows = self._rows(record)
        with shield(), _disk(self.path):
            self._insert(rows)
            self._records[record.number] = record

    def rows(self) -> list[dict[str, object]]:
        """One flat row per trial for trials.csv: number, state, reward, seconds, figures, levels, digest, repeat."""
        figures = list(dict.fromkeys(name for record in self.records for name in record.score))
        return [
            {
                "trial": record.number,
                "state": record.state,
                "reward": record.reward,
                "seconds": round(record.seconds, 3),
                **{name: record.score.get(name) for name in figures if name != "state"},
                **dict(zip(self.steps, record.actions or (None,) * len(self.steps), strict=True)),
                "reason": record.reason,
                "digest": record.digest,
                "look": record.repeat,
            }
            for record in self.records
        ]

    def close(self) -> None:
        """Close the file. All data is then in this one file, unless another process is reading it."""
        self._storage.remove_session()
        self._storage.engine.dispose()
        with suppress(sqlite3.OperationalError), closing(sqlite3.connect(self.path)) as connection:
            connection.execute("PRAGMA journal_mode = DELETE")

    def _insert(self, rows: Mapping[str, Sequence[Sequence[object]]]) -> None:
        """Insert all rows of a trial into Optuna's tables in one transaction, in Optuna's format.

        Optuna itself queries the database once or twice per parameter and attribute. That takes fifty times as long,
        too long for the one writing process when many evaluators deliver results.
        """
        connection = self._storage.engine.raw_connection()
        try:
            with connection.driver_connection as transaction:  # type: ignore[union-attr]
                trial: int | None = None
                for table, values in rows.items():
                    marks = ", ".join("?" * len(_COLUMNS[table]))
                    into = f"INSERT INTO {table} ({', '.join(_COLUMNS[table])}) VALUES ({marks})"
                    if trial is None:
                        trial = transaction.execute(into, values[0]).lastrowid
                    else:
                        transaction.executemany(into, [(trial, *row) for row in values])
        finally:
            connection.close()

    def _rows(self, record: Record) -> dict[str, list[tuple[object, ...]]]:
        """The rows that a record becomes in Optuna's tables: that of the trial, and those that refer to it."""
        done = record.state == "ok"
        if record.state not in ("ok", "nonfinite", "failed"):
            raise Refusal(f"state must be ok, nonfinite or failed, got {record.state!r}")
        if done != (record.reward is not None and finite(record.reward) is not None):
            raise Refusal(
                f"a trial must have a finite reward if it is ok and none otherwise, got {record.state!r} and "
                f"{record.reward!r}"
            )
        actions = record.actions
        if actions is not None and len(actions) != len(self.steps):
            raise Refusal(f"actions must be one per step, {len(self.steps)} in all, got {len(actions)}")
        if actions is not None and not all(0 <= action < self._levels for action in actions):
            raise Refusal(f"actions must be levels from 0 to {self._levels - 1}, got {list(actions)}")
        now = datetime.now(UTC).replace(tzinfo=None)
        attributes = {
            **{name: finite(value) for name, value in record.score.items()},
            "trial.number": record.number,
            "trial.state": record.state,
            "trial.reason": record.reason,
            "trial.seconds": record.seconds,
            "trial.look": record.repeat,
            "trial.asked": record.asked,
            "trial.slopes": finite(record.slopes),
            "trial.figures": list(record.score),
            "schedule.digest": record.digest,
            "schedule.json": record.schedule,
        }
        start = now - timedelta(seconds=max(0.0, record.seconds))
        state = (TrialState.COMPLETE if done else TrialState.FAIL).name
        return {
            "trials": [(len(self._records), self._study._study_id, state, _stamp(start), _stamp(now))],
            "trial_values": [(0, float(record.reward), "FINITE")] if record.reward is not None else [],
            "trial_params": [
                (name, float(action), self._distribution)
                for name, action in zip(self.steps, actions or (), strict=actions is not None)
            ],
            "trial_user_attributes": [(name, json.dumps(value)) for name, value in attributes.items()],
        }

    def _read(self, trial: FrozenTrial) -> Record:
        attrs = trial.user_attrs
        try:
            return Record(
                number=attrs["trial.number"],
                digest=attrs["schedule.digest"],
                schedule=attrs["schedule.json"],
                actions=tuple(trial.params[name] for name in self.steps) if trial.params else None,
                score=MappingProxyType({name: attrs[name] for name in attrs["trial.figures"]}),
                reward=trial.value,
                state=attrs["trial.state"],
                reason=attrs["trial.reason"],
                seconds=attrs["trial.seconds"],
                repeat=attrs.get("trial.look", 0),  # early versions did not write it
                slopes=_numbers(attrs.get("trial.slopes")),
                asked=attrs.get("trial.asked", attrs["trial.number"] + 1),  # nor this one
            )
        except KeyError as missing:
            raise Refusal(
                f"trial {trial.number} of {self.path} was not written by this program: no {missing}"
            ) from None


def _numbers(values: Mapping[str, float | None] | None) -> Mapping[str, float] | None:
    """Figures by name; NaN replaces None, which stands for a number that was not finite."""
    if values is None:
        return None
    return {name: math.nan if value is None else value for name, value in values.items()}


def refuse_another(
    path: Path, fingerprint: Mapping[str, object], defaults: Mapping[str, object] = MappingProxyType({})
) -> None:
    """Refuse the journal of another search. Writes nothing, and accepts a journal that does not exist yet.

    Args:
        fingerprint: as for `Journal`. Before the model is decomposed it lacks steps and levels; these are not compared
            then.
        defaults: as for `Journal`.

    Raises:
        ValueError, OSError: as `Journal`.
    """
    if not _is_sqlite(path):
        raise Refusal(f"{path} is not a journal: it must be an SQLite file")
    if (stored := stored_fingerprint(path)) is None:
        return
    plain = plain_values(fingerprint)
    comparable = {name: value for name, value in stored.items() if name in plain or name not in _SPACE}
    if (known := with_later(with_defaults(comparable, plain_values(defaults)), plain)) != plain:
        raise Refusal(f"{path} belongs to another search: " + "; ".join(differences(known, plain)))


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Raise disk errors of SQLite as OSError, also where Optuna and SQLAlchemy have wrapped them."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, sqlite3.Error):
            cause = cause.__cause__
        name = getattr(cause, "sqlite_errorname", "").removeprefix("SQLITE_").partition("_")[0]
        if name not in _DISK:
            raise
        raise OSError(_DISK[name], f"{os.strerror(_DISK[name])} while {path} was written") from error


def _stamp(moment: datetime) -> str:
    """A time in the format that SQLAlchemy writes into SQLite."""
    return moment.strftime("%Y-%m-%d %H:%M:%S.%f")


def stored_fingerprint(path: Path) -> dict[str, Any] | None:
    """The fingerprint of a journal; None if the journal does not exist yet or is empty."""
    if not path.exists():
        return None
    table = "study_user_attributes"
    address = f"{path.absolute().as_uri()}?mode=ro"
    with _disk(path), closing(sqlite3.connect(address, timeout=30, uri=True)) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone():
            return None
        row = connection.execute(f"SELECT value_json FROM {table} WHERE key = 'fingerprint'").fetchone()
    stored: dict[str, Any] | None = json.loads(row[0]) if row else None
    return stored


def _is_sqlite(path: Path) -> bool:
    """Whether SQLite can open the file: it is absent, empty, or starts with SQLite's header."""
    if not path.exists():
        return True
    with path.open("rb") as file:
        return file.read(16) in (b"", b"SQLite format 3\x00")


def _engine(path: Path) -> dict[str, Any]:
    """Engine options that open `path` as it is; in a URL the characters ? % # { would mean something else.

    While it is open the file has a write-ahead log, which brings a trial to disk with fewer flushes.
    """

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=30, check_same_thread=False)
        with suppress(sqlite3.OperationalError):  # where it cannot be had, as on some network disks, it goes without
            connection.execute("PRAGMA journal_mode = WAL")
        return connection

    return {"creator": connect}

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
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import optuna
from optuna.distributions import IntDistribution, distribution_to_json
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from pydantic import TypeAdapter

from compression.refusal import Refusal
from compression.storage.strict_json import parse
from compression.storage.whole_files import regular
from search.runtime.files import finite, write_whole
from search.runtime.signals import shield
from search.trials.fingerprints import differences, plain_values, with_defaults, with_later

__all__ = ["Journal", "Record", "refuse_another", "stored_fingerprint", "stored_trials"]

_STUDY = "chisel"
_SPACE = ("steps", "levels")  # parts of a fingerprint that are known only after the model is decomposed
_DISK = {"FULL": errno.ENOSPC, "IOERR": errno.EIO, "READONLY": errno.EROFS, "NOMEM": errno.ENOMEM}
_LOCKED = ("BUSY", "LOCKED")
_PATIENCE = 30.0  # seconds to wait for another program that has locked the file
_ADVICE = "put back a copy of it, or start a new run"
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


_FIELDS = TypeAdapter(Record)


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
        with _disk(path), _content(path):
            if not path.exists() or not path.stat().st_size:
                write_whole(path, _empty())
            # The tables are those of `_empty`, or `refuse_another` has compared them.
            self._storage = RDBStorage("sqlite://", engine_kwargs=_engine(path), skip_compatibility_check=True)
            self._study = optuna.create_study(
                study_name=_STUDY, storage=self._storage, direction="maximize", load_if_exists=True
            )
            if "fingerprint" not in self._study.user_attrs:
                self._study.set_user_attr("fingerprint", plain)
            trials = self._study.get_trials(deepcopy=False)
            self._records = {record.number: record for record in map(self._read, trials)}

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
            return _FIELDS.validate_python(
                {
                    "number": attrs["trial.number"],
                    "digest": attrs["schedule.digest"],
                    "schedule": attrs["schedule.json"],
                    "actions": tuple(trial.params[name] for name in self.steps) if trial.params else None,
                    "score": {name: attrs[name] for name in attrs["trial.figures"]},
                    "reward": trial.value,
                    "state": attrs["trial.state"],
                    "reason": attrs["trial.reason"],
                    "seconds": attrs["trial.seconds"],
                    "repeat": attrs.get("trial.look", 0),  # early versions did not write it
                    "slopes": _numbers(attrs.get("trial.slopes")),
                    "asked": attrs.get("trial.asked", attrs["trial.number"] + 1),  # nor this one
                }
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
    if (stored := stored_fingerprint(path)) is None:
        return
    plain = plain_values(fingerprint)
    comparable = {name: value for name, value in stored.items() if name in plain or name not in _SPACE}
    if (known := with_later(with_defaults(comparable, plain_values(defaults)), plain)) != plain:
        raise Refusal(f"{path} belongs to another search: " + "; ".join(differences(known, plain)))


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Raise errors of SQLite as an OSError about disk or lock, also where Optuna and SQLAlchemy have wrapped them.

    Raises:
        Refusal: the file is damaged or has other tables than Optuna's.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, sqlite3.Error):
            cause = cause.__cause__
        name = getattr(cause, "sqlite_errorname", "").removeprefix("SQLITE_").partition("_")[0]
        if name in _LOCKED:
            text = f"{path} is locked by another program, such as a database browser; close that"
            raise OSError(errno.EBUSY, text) from error
        if name not in _DISK and isinstance(cause, sqlite3.DatabaseError):
            raise Refusal(f"{path} cannot be used: {cause}; {_ADVICE}") from error
        if name not in _DISK:
            raise
        raise OSError(_DISK[name], f"{os.strerror(_DISK[name])} while {path} was written") from error


@contextmanager
def _content(path: Path) -> Iterator[None]:
    """Refuse a journal whose content neither SQLite nor Optuna nor this program can make sense of."""
    try:
        yield
    except (Refusal, OSError, sqlite3.Error, MemoryError):
        raise
    except Exception as error:
        if isinstance(error.__cause__, sqlite3.Error):
            raise
        reason = " ".join(str(error).split())
        raise Refusal(
            f"{path} cannot be used, it is damaged or of another program: {reason:.200}; {_ADVICE}"
        ) from error


def _stamp(moment: datetime) -> str:
    """A time in the format that SQLAlchemy writes into SQLite."""
    return moment.strftime("%Y-%m-%d %H:%M:%S.%f")


def stored_fingerprint(path: Path) -> dict[str, Any] | None:
    """The fingerprint of a journal; None if the journal does not exist yet or is empty.

    Raises:
        Refusal: the file is no SQLite file, is damaged, or was made by a later version of Optuna.
        OSError: it cannot be read, or another program has locked it.
    """
    with _opened(path) as connection:
        if connection is None:
            return None
        row = connection.execute("SELECT value_json FROM study_user_attributes WHERE key = 'fingerprint'").fetchone()
    try:
        stored = parse(row[0]) if row else None
        if not isinstance(stored, dict | None):
            raise Refusal(f"expected an object, got {stored!r:.80}")
    except (Refusal, TypeError) as error:
        raise Refusal(f"{path} is damaged, its fingerprint is not usable ({error}); {_ADVICE}") from None
    return stored


def stored_trials(path: Path) -> int:
    """Number of trials in a journal; 0 if it does not exist or is empty. Raises as `stored_fingerprint`."""
    with _opened(path) as connection:
        return 0 if connection is None else int(connection.execute("SELECT count(*) FROM trials").fetchone()[0])


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection | None]:
    """A connection that only reads a journal whose pages were checked; None if there is no journal in it yet."""
    if not path.exists():
        yield None
        return
    with open(path, "rb", opener=regular) as file:
        if file.read(16) not in (b"", b"SQLite format 3\x00"):
            raise Refusal(f"{path} is not a journal: it must be an SQLite file")
    address = f"{path.absolute().as_uri()}?mode=ro"
    with (
        _disk(path),
        _content(path),
        closing(sqlite3.connect(address, timeout=_PATIENCE, uri=True)) as connection,
    ):
        [verdict] = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise Refusal(f"{path} is damaged: {' '.join(verdict.split())}; {_ADVICE}")
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'study_user_attributes'").fetchone():
            yield None
            return
        version = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        if version is not None and version[0] != _schema():
            maker = connection.execute("SELECT library_version FROM version_info").fetchone()
            raise Refusal(
                f"{path} has tables of Optuna {maker[0] if maker else 'of another version'}, and this is Optuna "
                f"{optuna.__version__}; install that version, or start a new run"
            )
        for table, columns in _COLUMNS.items():
            connection.execute(f"SELECT {', '.join(columns)} FROM {table} LIMIT 0")
        yield connection


@cache
def _empty() -> bytes:
    """A file with the tables that the installed Optuna makes. It makes them slowly, so that a process does it once."""
    with closing(sqlite3.connect(":memory:", check_same_thread=False)) as connection:
        storage = RDBStorage("sqlite://", engine_kwargs={"creator": lambda: connection}, skip_compatibility_check=True)
        content = connection.serialize()
        storage.remove_session()
        storage.engine.dispose()
        return content


@cache
def _schema() -> str:
    """The revision of the tables that the installed Optuna makes."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.deserialize(_empty())
        return str(connection.execute("SELECT version_num FROM alembic_version").fetchone()[0])


def _engine(path: Path) -> dict[str, Any]:
    """Engine options that open `path` as it is; in a URL the characters ? % # { would mean something else.

    While it is open the file has a write-ahead log, which brings a trial to disk with fewer flushes.
    """

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=_PATIENCE, check_same_thread=False)
        with suppress(sqlite3.OperationalError):  # where it cannot be had, as on some network disks, it goes without
            connection.execute("PRAGMA journal_mode = WAL")
        return connection

    return {"creator": connect}

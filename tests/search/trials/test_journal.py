import errno
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from datetime import datetime

import optuna
import pytest

from compression.refusal import Refusal
from search.trials import journal as journal_module
from search.trials.fingerprints import differences
from search.trials.journal import Journal, Record
from search.trials.setup import refuse_lost_trials

FINGERPRINT = {"model": "m1", "target_kept": 0.8, "data": {"items": "abc", "text": "def"}}


def journal(path, **changes):
    arguments = {"fingerprint": FINGERPRINT, "steps": ("block_00", "block_01"), "levels": 5, **changes}
    return Journal(path, **arguments)


def record(number=0, **changes):
    values = {
        "digest": f"digest{number}",
        "schedule": '{"a": 1}',
        "actions": (number % 5, 4),
        "score": {"kl": 0.1 + 0.2, "items": 32, "accuracy": 1 / 3},
        "reward": -0.1 - 0.2,
        "state": "ok",
        "seconds": 1.5,
    }
    return Record(number=number, **{**values, **changes})


def test_records_read_back_exactly(tmp_path):
    kept = [record(0), record(1, actions=None), record(2)]
    first = journal(tmp_path / "study.db")
    for one in kept:
        first.record(one)
    first.close()
    again = journal(tmp_path / "study.db")
    assert list(again.records) == kept
    assert dict(again.records[0].score) == {"kl": 0.1 + 0.2, "items": 32, "accuracy": 1 / 3}
    again.close()


def test_another_program_sees_an_optuna_study_with_parameters_and_figures(tmp_path):
    one = journal(tmp_path / "study.db")
    one.record(record(3))
    one.close()
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'study.db'}")
    (trial,) = study.trials
    assert trial.params == {"block_00": 3, "block_01": 4}
    assert study.best_value == -0.1 - 0.2
    assert trial.user_attrs["kl"] == 0.1 + 0.2
    assert trial.duration.total_seconds() == pytest.approx(1.5)
    study._storage._backend.remove_session()
    study._storage._backend.engine.dispose()


def test_an_open_journal_can_be_read_by_others_and_a_closed_one_is_a_single_file(tmp_path):
    path = tmp_path / "study.db"
    one = journal(path)
    one.record(record(0))
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as reader:
        assert reader.execute("SELECT count(*) FROM trials").fetchone() == (1,)
        one.record(record(1))
        assert reader.execute("SELECT count(*) FROM trials").fetchone() == (2,)
        assert reader.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    one.close()
    assert [file.name for file in tmp_path.iterdir()] == ["study.db"]
    with closing(sqlite3.connect(path)) as reader:
        assert reader.execute("PRAGMA journal_mode").fetchone() == ("delete",)


_TABLES = ("trials", "trial_values", "trial_params", "trial_user_attributes", "trial_system_attributes")
_COUNTERS = ("trial_value_id", "param_id", "trial_user_attribute_id", "trial_system_attribute_id")


def _content(path):
    """Every row of every table that tells of trials, without the rows' own numbers, their order and the times."""
    with closing(sqlite3.connect(path)) as file:
        file.row_factory = sqlite3.Row
        rows = {table: [dict(row) for row in file.execute(f"SELECT * FROM {table}")] for table in _TABLES}
    for table, found in rows.items():
        for row in found:
            for name in [name for name in row if name.startswith("datetime") or name in _COUNTERS]:
                del row[name]
        rows[table] = sorted(found, key=str)
    return rows


def test_the_rows_are_those_that_optuna_itself_writes(tmp_path):
    one = journal(tmp_path / "study.db")
    one.record(record(0, slopes={"a": 0.5, "b": math.nan}))
    one.record(record(1, actions=None))
    one.record(record(2, state="failed", reward=None, reason="no \u00e4tsch"))
    one.close()
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'study.db'}")
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'optuna.db'}")
    other = optuna.create_study(storage=storage, direction="maximize")
    other.add_trials(study.trials)
    for each in (study._storage._backend, storage):
        each.remove_session()
        each.engine.dispose()
    ours, theirs = _content(tmp_path / "study.db"), _content(tmp_path / "optuna.db")
    assert ours == theirs
    assert {table: len(rows) for table, rows in ours.items()}["trials"] == 3
    now = datetime.now()
    assert all(abs((trial.datetime_complete - now).total_seconds()) < 60 for trial in study.trials)


def test_a_trial_costs_the_writing_process_little(tmp_path):
    one = journal(tmp_path / "study.db", steps=tuple(f"block_{number:02}" for number in range(40)), levels=20)
    score = {f"figure {number}": number / 7 for number in range(20)}
    start = time.process_time()
    for number in range(20):
        one.record(record(number, actions=(number,) * 40, score=score))
    ours = time.process_time() - start
    one.close()
    study = optuna.create_study(storage=f"sqlite:///{tmp_path / 'optuna.db'}", direction="maximize")
    kept = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'study.db'}").trials
    start = time.process_time()
    for trial in kept[:4]:
        study.add_trial(trial)
    assert ours / 20 < (time.process_time() - start) / 4 / 5


def test_an_action_beyond_the_levels_is_refused(tmp_path):
    one = journal(tmp_path / "study.db")
    with pytest.raises(ValueError, match=r"levels from 0 to 4, got \[1, 5\]"):
        one.record(record(0, actions=(1, 5)))
    assert not one.records
    one.close()


@pytest.mark.parametrize("state", ["nonfinite", "failed"])
def test_a_trial_without_a_figure_is_a_failed_trial_never_a_number(tmp_path, state):
    one = journal(tmp_path / "study.db")
    one.record(record(0, state=state, reward=None, score={"kl": float("nan")}, reason="logits are NaN"))
    one.close()
    again = journal(tmp_path / "study.db")
    assert again.records[0].state == state
    assert again.records[0].reason == "logits are NaN"
    assert again.records[0].score["kl"] is None
    assert ("digest0", 0) in [record.key for record in again.records]
    assert again._study.trials[0].state == optuna.trial.TrialState.FAIL
    assert again._study.trials[0].value is None
    again.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward": float("nan")}, "must have a finite reward if it is ok"),
        ({"reward": None}, "must have a finite reward if it is ok"),
        ({"state": "failed"}, "must have a finite reward if it is ok"),
        ({"state": "fine"}, "state must be ok, nonfinite or failed, got 'fine'"),
        ({"actions": (1,)}, "actions must be one per step"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(tmp_path, changes, words):
    one = journal(tmp_path / "study.db")
    with pytest.raises(ValueError, match=words):
        one.record(record(**changes))
    assert one.records == []
    one.close()


def test_another_fingerprint_is_refused_with_what_differs(tmp_path):
    journal(tmp_path / "study.db").close()
    changed = {**FINGERPRINT, "target_kept": 0.7, "data": {"items": "xyz", "text": "def"}}
    with pytest.raises(ValueError) as refused:
        journal(tmp_path / "study.db", fingerprint=changed, levels=6)
    message = str(refused.value)
    for words in ("data.items was abc, is xyz", "target_kept was 0.8, is 0.7", "levels was 5, is 6"):
        assert words in message
    assert "model" not in message
    journal(tmp_path / "study.db").close()


def test_a_repeated_trial_is_kept_once_and_a_different_one_refused(tmp_path):
    one = journal(tmp_path / "study.db")
    one.record(record(0))
    one.record(record(0, seconds=99.0))
    assert len(one.records) == len(one._study.trials) == 1
    with pytest.raises(ValueError, match="code, seed or machine differ"):
        one.record(record(0, digest="another"))
    one.close()


def test_rows_are_flat_and_have_figures_and_levels(tmp_path):
    one = journal(tmp_path / "study.db")
    one.record(record(1))
    one.record(record(0, actions=None, state="failed", reward=None, score={}, reason="killed"))
    first, second = one.rows()
    assert first == {
        "trial": 0, "state": "failed", "reward": None, "seconds": 1.5, "kl": None, "items": None, "accuracy": None,
        "block_00": None, "block_01": None, "reason": "killed", "digest": "digest0", "look": 0,
    }  # fmt: skip
    assert (second["trial"], second["kl"], second["block_00"]) == (1, 0.1 + 0.2, 1)
    one.close()


@pytest.mark.parametrize("name", ["my study ä.db", "a?b#c%20{d}.db"])
def test_a_path_is_taken_as_it_is(tmp_path, name):
    one = journal(tmp_path / name)
    one.record(record(0))
    one.close()
    assert (tmp_path / name).exists()
    assert len([entry for entry in tmp_path.iterdir() if entry.name.startswith(name)]) == len(list(tmp_path.iterdir()))


def test_what_is_no_sqlite_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "study.db"
    path.write_bytes(b"\x80\x04 a pickle, say")
    with pytest.raises(ValueError, match="not a journal"):
        journal(path)
    assert path.read_bytes() == b"\x80\x04 a pickle, say"


def test_a_study_of_another_program_is_refused(tmp_path):
    one = journal(tmp_path / "study.db")
    one._study.add_trial(optuna.trial.create_trial(value=1.0))
    one.close()
    with pytest.raises(ValueError, match="was not written by this program"):
        journal(tmp_path / "study.db")


_WRITER = """
import sys
from pathlib import Path
from search.trials.journal import Journal, Record
journal = Journal(Path(sys.argv[1]), {"model": "m1"}, ("block_00",), 5)
for number in range(len(journal.records), 10_000):
    journal.record(Record(number, f"digest{number}", "{}", (number % 5,), {"kl": number / 7}, -number / 7, "ok"))
    print(number, flush=True)
"""


@pytest.mark.slow
def test_a_killed_writer_loses_no_acknowledged_trial_and_leaves_none_running(tmp_path):
    path, acknowledged = tmp_path / "study.db", -1
    for wanted in (3, 17):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        for _ in range(wanted):
            acknowledged = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
        rest = writer.stdout.read().split()
        writer.stdout.close()
        writer.wait(timeout=60)
        acknowledged = int(rest[-1]) if rest else acknowledged
    one = Journal(path, {"model": "m1"}, ("block_00",), 5)
    assert [r.number for r in one.records] == list(range(len(one.records)))
    assert len(one.records) in (acknowledged + 1, acknowledged + 2)
    assert all(r.reward == -r.number / 7 and r.score == {"kl": r.number / 7} for r in one.records)
    assert {trial.state for trial in one._study.trials} == {optuna.trial.TrialState.COMPLETE}
    one.close()
    connection = sqlite3.connect(path)
    assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
    connection.close()


def test_differences_go_into_nested_values():
    assert differences({"a": 1, "b": {"c": 2}}, {"b": {"c": 3}, "d": None}) == [
        "a was 1, is absent",
        "b.c was 2, is 3",
        "d was absent, is null",
    ]
    assert differences(FINGERPRINT, FINGERPRINT) == []


def stored(path, trials=20):
    """A closed journal with some trials, as bytes."""
    one = journal(path)
    for number in range(trials):
        one.record(record(number))
    one.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return stored(tmp_path_factory.mktemp("whole") / "study.db")


def changed(statement):
    def change(path):
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(statement)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "damaged|malformed"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "damaged|malformed"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "damaged|malformed|not a database"),
        (lambda path: path.write_bytes(path.read_bytes()[:4096] + os.urandom(40000)), "damaged|malformed"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "it is a FIFO, not a file"),
        (lambda path: (path.unlink(), path.mkdir()), "it is a folder, not a file"),
        (changed("UPDATE alembic_version SET version_num = 'v9.9.9'"), "tables of Optuna .* this is Optuna"),
        (changed("DROP TABLE trials"), "no such table"),
        (changed("DROP TABLE alembic_version"), "no such table"),
        (changed("ALTER TABLE trial_user_attributes RENAME COLUMN value_json TO gone"), "no such column"),
        (changed("UPDATE study_user_attributes SET value_json = '{'"), "damaged"),
        (
            changed("UPDATE study_user_attributes SET value_json = '3'"),
            r"fingerprint is not usable .expected an object",
        ),
        (changed("UPDATE trial_user_attributes SET value_json = '{'"), "damaged"),
        (changed("UPDATE trial_user_attributes SET value_json = '\"x\"' WHERE key = 'trial.number'"), "damaged"),
        (changed("UPDATE trial_user_attributes SET value_json = '7' WHERE key = 'trial.figures'"), "damaged"),
        (changed("UPDATE trial_user_attributes SET value_json = '[]' WHERE key = 'schedule.json'"), "damaged"),
        (changed("DELETE FROM trial_user_attributes WHERE key = 'kl'"), "not written by this program"),
        (changed("UPDATE trials SET state = 'ODD'"), "damaged"),
        (changed("UPDATE trial_params SET distribution_json = 'x'"), "damaged"),
    ],
)
def test_a_journal_that_is_cut_or_changed_is_refused_in_one_line_that_names_it(tmp_path, whole, change, message):
    path = tmp_path / "study.db"
    path.write_bytes(whole)
    change(path)
    with pytest.raises((Refusal, OSError), match=message) as error:
        journal(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_locked_journal_stops_with_the_name_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "_PATIENCE", 0.05)
    path = tmp_path / "study.db"
    stored(path, 1)
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(OSError, match="is locked by another program") as error:
            journal(path)
        assert error.value.errno == errno.EBUSY
    one = journal(path)
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OSError, match="is locked by another program"):
            one.record(record(1))
    one.record(record(1))
    one.close()


def test_a_search_whose_journal_is_gone_empty_or_older_than_its_table_is_not_begun_anew(tmp_path):
    path = tmp_path / "study.db"
    refuse_lost_trials(path)
    content = stored(path, 3)
    (tmp_path / "trials.csv").write_text("trial,state\n0,ok\n1,ok\n2,ok\n")
    refuse_lost_trials(path)
    for lose in (lambda: path.write_bytes(b""), path.unlink, lambda: stored(path, 2)):
        lose()
        with pytest.raises(Refusal, match=r"has lost trials: it holds [02], and trials.csv beside it"):
            refuse_lost_trials(path)
    path.write_bytes(content)
    refuse_lost_trials(path)

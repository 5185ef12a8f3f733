"""The doctor: what a machine lacks is said with what to do about it, and decides the exit code."""

from __future__ import annotations

import importlib
import json
import pwd
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fake_data import fake_data

from search import cli
from search.commands import machine_check

__all__ = ["fake_data"]


def findings(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, str]]]:
    code = cli.main(["doctor", "--json"])
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["problems"] == sum(one["state"] == "problem" for one in document["findings"])
    return code, {one["name"]: one for one in document["findings"]}


@pytest.mark.usefixtures("fake_data")
def test_a_machine_with_everything_is_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_check, "_CACHE_GIB", 0.0)
    code, found = findings(capsys)
    assert code == 0
    assert found["data"]["state"] == found["python"]["state"] == found["torch"]["state"] == "ok"
    assert cli.main(["doctor"]) == 0
    assert "The default job can run." in capsys.readouterr().out


def test_data_that_is_not_here_is_a_note_and_not_fetched(
    fake_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_check, "_CACHE_GIB", 0.0)
    next(fake_data.glob("exllamav2*")).unlink()
    code, found = findings(capsys)
    assert code == 0
    assert found["data"]["state"] == "note"
    assert "exllamav2" in found["data"]["found"]
    assert "search.py data" in found["data"]["advice"]


def test_damaged_data_is_a_problem(fake_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next(fake_data.glob("exllamav2*")).write_bytes(b"no wheel")
    code, found = findings(capsys)
    assert code == 3
    assert found["data"]["state"] == "problem"


@pytest.mark.usefixtures("fake_data")
def test_a_library_that_cannot_be_imported_and_a_full_disk_are_problems(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def imported(name: str) -> ModuleType:
        if name == "gguf":
            raise RuntimeError("half installed\nsecond line")
        return importlib.import_module(name)

    monkeypatch.setattr(machine_check, "import_module", imported)
    monkeypatch.setattr(machine_check, "_CACHE_GIB", 1e9)
    code, found = findings(capsys)
    assert code == 3
    assert found["gguf"] == {
        "name": "gguf",
        "state": "problem",
        "found": "cannot be imported: half installed",
        "advice": "make setup",
    }
    assert "CHISEL_CACHE" in found["cache"]["advice"]


@pytest.mark.usefixtures("fake_data")
def test_a_missing_extra_is_a_note_that_names_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_check, "_CACHE_GIB", 0.0)
    monkeypatch.setattr(machine_check.importlib.util, "find_spec", lambda name: None)
    code, found = findings(capsys)
    assert code == 0
    for extra in ("agents", "cluster"):
        assert found[f"extra {extra}"]["state"] == "note"
        assert f"chisel-prior[{extra}]" in found[f"extra {extra}"]["advice"]


def test_a_user_without_a_home_gets_findings_that_say_what_to_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "CHISEL_CACHE", "CHISEL_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    code, found = findings(capsys)
    assert code == 3
    for name in ("cache", "data"):
        assert found[name]["state"] == "problem"
        assert "CHISEL_CACHE" in found[name]["advice"]
        assert "Could not determine home directory" in found[name]["found"]


def unknown(_: int) -> None:
    """What the list of users says of a number that is not in it."""
    raise KeyError("getpwuid(): uid not found")


def test_the_time_of_a_job_is_in_proportion_to_the_speed_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = {}
    for seconds in (2 * 1024**3 / 150e9, 2 * 1024**3 / 15e9):  # of one product of matrices
        clock = iter(index * seconds for index in range(20))
        monkeypatch.setattr(machine_check.time, "perf_counter", lambda clock=clock: next(clock))
        [found[seconds]] = machine_check._speed()
    fast, slow = found.values()
    assert (fast.state, slow.state) == ("ok", "note")
    assert fast.found == "150 GFLOP/s now: about 55 minutes for the default job, 19 with --quick"
    assert slow.found == "15 GFLOP/s now: about 550 minutes for the default job, 188 with --quick"
    assert slow.advice == "stop other jobs, or use --quick"

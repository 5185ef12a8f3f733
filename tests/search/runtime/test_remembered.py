"""The digest of a large file is computed once, and again as soon as the file may have changed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from search.runtime import remembered
from search.runtime.files import file_digest
from search.runtime.remembered import Stamp, remembered_answer, remembered_digest


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as large and as old enough for its times to tell whether it changes."""
    monkeypatch.setenv("CHISEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "SMALL", 10)
    monkeypatch.setattr(remembered, "_RECENT", -1)
    path = tmp_path / "weights"
    path.write_bytes(b"0123456789")
    return path


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    paths: list[Path] = []
    monkeypatch.setattr(remembered, "file_digest", lambda path: paths.append(path) or file_digest(path))
    return paths


def test_a_digest_is_computed_once(large: Path, computed: list[Path]) -> None:
    assert remembered_digest(large) == remembered_digest(large) == file_digest(large)
    assert len(computed) == 1


def rewrite(path: Path) -> None:
    """Other bytes in the same file, of the same length and with the same time of modification."""
    at = path.stat()
    time.sleep(0.01)
    with path.open("r+b") as file:
        file.write(b"9876543210")
    os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns))


def exchange(path: Path) -> None:
    at = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"9876543210")
    os.utime(other, ns=(at.st_atime_ns, at.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [rewrite, exchange])
def test_a_file_that_changes_behind_its_size_and_time_is_digested_again(
    change: Callable[[Path], None], large: Path, computed: list[Path]
) -> None:
    before = remembered_digest(large)
    change(large)
    assert remembered_digest(large) == file_digest(large) != before
    assert len(computed) == 2


def test_a_remembered_digest_that_was_changed_or_moved_is_not_used(
    large: Path, tmp_path: Path, computed: list[Path]
) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"abcdefghij")
    digests = [remembered_digest(path) for path in (large, other)]
    places = sorted((tmp_path / "cache" / "digests").rglob("*.json"))
    contents = [place.read_text() for place in places]
    for place, content in zip(places, reversed(contents), strict=True):
        place.write_text(content)
    assert [remembered_digest(path) for path in (large, other)] == digests
    for place in places:
        place.write_text(json.dumps(json.loads(place.read_text()) | {"digest": "0" * 64}))
    assert [remembered_digest(path) for path in (large, other)] == digests
    assert len(computed) == 6


def test_nothing_is_remembered_of_small_files_and_of_those_that_just_changed(
    large: Path, tmp_path: Path, computed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "_RECENT", 10**12)
    remembered_digest(large)
    monkeypatch.setattr(remembered, "_RECENT", -1)
    monkeypatch.setattr(remembered, "SMALL", 11)
    remembered_digest(large)
    assert not list((tmp_path / "cache").rglob("*.json"))
    assert len(computed) == 2


def test_a_file_that_changes_meanwhile_is_not_remembered(large: Path, tmp_path: Path) -> None:
    stamp = Stamp.of([large])
    assert stamp.remembered("x", lambda: rewrite(large) or "0" * 64) == "0" * 64  # type: ignore[func-returns-value]
    assert not list((tmp_path / "cache").rglob("*.json"))


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bool], tuple[bool, int]]:
    """Asks a question; gives the answer, and how often it has been computed."""
    monkeypatch.setenv("CHISEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "_SLOW", 0.0)
    computed: list[str] = []

    def ask(question: str, truth: bool) -> tuple[bool, int]:
        return remembered_answer({"is": question}, lambda: computed.append(question) is None and truth), len(computed)

    return ask


@pytest.mark.parametrize("truth", [True, False])
def test_an_answer_is_computed_once_for_each_question(
    truth: bool, asked: Callable[[str, bool], tuple[bool, int]]
) -> None:
    assert asked("it", truth) == (truth, 1)
    assert asked("it", not truth) == (truth, 1)
    assert asked("another", not truth) == (not truth, 2)


@pytest.mark.parametrize("content", ["", "{}", "true", None], ids=["empty", "no fields", "no object", "changed answer"])
def test_an_answer_in_a_damaged_file_is_computed_again(
    content: str | None, asked: Callable[[str, bool], tuple[bool, int]], tmp_path: Path
) -> None:
    asked("it", True)
    [file] = (tmp_path / "cache").rglob("*.json")
    if content is None:
        asked("not it", False)
        [other] = (one for one in (tmp_path / "cache").rglob("*.json") if one != file)
        content = other.read_text()
    file.write_text(content)
    computed = asked("it", True)[1]
    assert asked("it", False) == (True, computed)


def test_what_is_computed_quickly_is_not_stored(
    asked: Callable[[str, bool], tuple[bool, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(remembered, "_SLOW", 60.0)
    assert [asked("it", True)[1], asked("it", True)[1]] == [1, 2]
    assert not list((tmp_path / "cache").rglob("*.json"))

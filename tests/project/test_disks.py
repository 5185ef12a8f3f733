"""A disk that is full or may not be written, for real."""

from __future__ import annotations

import errno
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import SEARCH, on_a_disk
from fake_data import data_for_processes

from benchmarks.chaos import journal
from search import cli

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run, and data in the environment."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        data_for_processes(folder, patch)
        assert cli.main([*SEARCH, "--budget", "2", "--form", "factors", "--out", str(folder / "run")]) == cli.DONE
        yield folder / "run"


def test_a_search_stops_when_the_disk_is_full_and_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_for_processes(tmp_path, monkeypatch)
    disk, kept = tmp_path / "kleine platte", tmp_path / "kept"
    run = disk / "run"
    codes, said = on_a_disk(
        disk,
        "size=400k",
        [*SEARCH, "--budget", "150", "--out", str(run)],
        f"cp -r {shlex.quote(str(run))} {kept}",
        f"mount -o remount,size=50m {shlex.quote(str(disk))}",
        ["--resume", str(run), "--quiet"],
        f"cp {shlex.quote(str(run))}/study.db {tmp_path}/whole.db",
    )
    assert codes == [4, 0, 0, 0, 0], said
    assert "Traceback" not in said
    assert f"--resume {shlex.quote(str(run))}" in said
    stopped, whole = journal(kept / "study.db"), journal(tmp_path / "whole.db")
    assert 0 < len(stopped) < len(whole) == 150
    assert all(whole[number] == trial for number, trial in stopped.items())
    assert [file.name for file in kept.iterdir() if file.suffix == ".tmp"] == []


def at_every(sizes: tuple[str, ...], disk: Path, *steps: str | list[str]) -> list[str | list[str]]:
    """Steps with the disk of one size after the other."""
    return [step for size in sizes for step in (f"mount -o remount,size={size} {disk}", *steps)]


def test_a_healing_stops_when_the_disk_is_full_and_goes_on_when_there_is_room(finished: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    training = ["--tokens", "300", "--row-tokens", "32", "--batch-tokens", "64", "--out", str(disk / "healed")]
    heal = ["heal", str(finished), *training, "--quiet"]
    sizes = ("40k", "160k", "280k")  # for no weights to start from, for these, and for what is half trained
    codes, said = on_a_disk(
        disk,
        "size=40k",
        *at_every(sizes, disk, heal, f'test -z "$(find {disk} -name "*.tmp")"'),
        f"mount -o remount,size=50m {disk}",
        heal,
        f"test -f {disk}/healed/healing.json",
    )
    assert codes == [*[0, 4, 0] * len(sizes), 0, 0, 0], said
    assert "Traceback" not in said
    assert re.findall("No space left on device while .*/(.*) was written", said)[::2] == ["start", "healed"]


def test_an_export_leaves_nothing_where_the_disk_is_full_and_works_when_there_is_room(
    finished: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    out = disk / "model"
    export = ["export", str(finished), "--out", str(out), "--quiet"]
    sizes = ("60k", "84k", "164k")  # for no weights, for these but no tokenizer, for all but the last file
    codes, said = on_a_disk(
        disk,
        "size=60k",
        *at_every(sizes, disk, export, f'test -z "$(ls -A {disk})"'),
        f"mount -o remount,size=50m {disk}",
        export,
        f"test -f {out}/prior.json",
    )
    assert codes == [*[0, 4, 0] * len(sizes), 0, 0, 0], said
    assert "Traceback" not in said
    assert said.count("No space left on device") == len(sizes)


def test_a_cache_that_cannot_fit_is_refused_before_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_for_processes(tmp_path, monkeypatch)
    disk, cache, out = tmp_path / "disk", tmp_path / "cache", tmp_path / "run"
    codes, said = on_a_disk(
        disk,
        "size=400k",
        ["data"],
        f"cp -r {cache}/. {disk}",
        [f"CHISEL_CACHE={disk}", *SEARCH, "--budget", "2", "--out", str(out)],
        f'test -z "$(find {disk}/factors -type f)"',
    )
    assert codes == [0, 0, 4, 0], said
    assert re.search(r"the cache .* needs [\d.]+ MB of disk and [\d.]+ MB are free; .*--resume", said)


_STORE = """
import json, sys, torch
from pathlib import Path
from compression.storage.factor_cache import Bundle, FactorCache, cache_key
cache = FactorCache(Path(sys.argv[1]))
cache.store(cache_key(n=1), Bundle({"small": torch.ones(1000)}))
try:
    cache.store(cache_key(n=2), Bundle({"large": torch.ones(1_000_000)}))
except OSError as error:
    found = [error.errno]
found.append(sum(1 for file in cache.root.rglob("*") if file.is_file()))
found.append(int(cache.load(cache_key(n=1)).tensors["small"].sum()))
Path(sys.argv[2]).write_text(json.dumps(found))
"""


def test_a_cache_file_that_does_not_fit_leaves_none_cut_and_those_before_it_whole(tmp_path: Path) -> None:
    found = tmp_path / "found"
    codes, said = on_a_disk(tmp_path / "disk", "size=1000k", ["-c", _STORE, str(tmp_path / "disk"), str(found)])
    assert codes == [0], said
    assert json.loads(found.read_text()) == [errno.ENOSPC, 1, 1000], said


def test_a_home_that_may_not_be_written_is_no_hindrance_with_a_cache_elsewhere_and_without_one_it_is_told_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_for_processes(tmp_path, monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with_cache, without = ([*SEARCH, "--budget", "2", "--out", str(tmp_path / name)] for name in ("run", "no run"))
    with_cache += ["--evaluators", "1"]
    codes, said = on_a_disk(tmp_path / "home", "ro", with_cache, ["CHISEL_CACHE=", *without], fresh=True)
    assert codes == [0, 2], said
    assert len(journal(tmp_path / "run" / "study.db")) == 2
    assert re.fullmatch(r"search\.py: .*Read-only file system.*CHISEL_CACHE.*\n", said)
    assert not (tmp_path / "no run").exists()

"""A disk that is full, for real: a small file system of its own, in a mount namespace that ends with the command."""

from __future__ import annotations

import errno
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fakedata import data_for_processes

from benchmarks.chaos import ROOT, journal

SEARCH = [
    *(sys.executable, "search.py", "--model", "random:tiny-llama", "--device", "cpu", "--threads", "1", "--quiet"),
    *("--agent", "random", "--target-kept", "0.7", "--calibration-tokens", "1500", "--repair-tokens", "0"),
    *("--search-items", "2", "--search-text-tokens", "128", "--heldout-tokens", "600", "--report-items", "6"),
]


def on_a_small_disk(disk: Path, kilobytes: int, *steps: str) -> tuple[list[int], str]:
    """Exit codes of shell commands, one after the other, with so much room in `disk`; and what they complained of."""
    disk.mkdir(parents=True, exist_ok=True)
    mount = f"mount -t tmpfs -o size={kilobytes}k none {shlex.quote(str(disk))}"
    script = "\n".join([f"{mount} || exit 99", *(f"{step}; echo $?" for step in steps)])
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    return [int(line) for line in done.stdout.split("\n") if line.isdecimal()], done.stderr


def test_a_search_stops_when_the_disk_is_full_and_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_for_processes(tmp_path, monkeypatch)
    disk, kept = tmp_path / "kleine platte", tmp_path / "kept"
    run, disk_of_export = disk / "run", tmp_path / "export"
    codes, said = on_a_small_disk(
        disk,
        400,
        shlex.join([*SEARCH, "--budget", "150", "--out", str(run)]),
        f"cp -r {shlex.quote(str(run))} {kept}",
        f"mount -o remount,size=50m {shlex.quote(str(disk))}",
        shlex.join([sys.executable, "search.py", "--resume", str(run), "--quiet"]),
        f"cp {shlex.quote(str(run))}/study.db {tmp_path}/whole.db",
        f"mkdir {disk_of_export} && mount -t tmpfs -o size=100k none {disk_of_export}",
        shlex.join([sys.executable, "search.py", "export", str(run), "--out", f"{disk_of_export}/model"]),
        f'test -z "$(ls -A {disk_of_export})"',
    )
    assert codes == [4, 0, 0, 0, 0, 0, 4, 0], said
    assert "Traceback" not in said
    assert f"--resume {shlex.quote(str(run))}" in said
    stopped, whole = journal(kept / "study.db"), journal(tmp_path / "whole.db")
    assert 0 < len(stopped) < len(whole) == 150
    assert all(whole[number] == trial for number, trial in stopped.items())
    assert [file.name for file in kept.iterdir() if file.suffix in (".partial", ".tmp")] == []


def test_a_cache_that_cannot_fit_is_refused_before_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_for_processes(tmp_path, monkeypatch)
    disk, cache, out = tmp_path / "disk", tmp_path / "cache", tmp_path / "run"
    codes, said = on_a_small_disk(
        disk,
        400,
        shlex.join([sys.executable, "search.py", "data"]) + " > /dev/null",
        f"cp -r {cache}/. {disk}",
        f"CHISEL_CACHE={disk} {shlex.join([*SEARCH, '--budget', '2', '--out', str(out)])}",
        f'test -z "$(find {disk}/factors -type f)"',
    )
    assert codes == [0, 0, 4, 0], said
    assert re.search(r"the cache .* needs [\d.]+ MB of disk and [\d.]+ MB are free; .*--resume", said)


_STORE = """
import sys, torch
from pathlib import Path
from compression.cache import Bundle, FactorCache, cache_key
cache = FactorCache(Path(sys.argv[1]))
cache.store(cache_key(n=1), Bundle({"small": torch.ones(1000)}))
try:
    cache.store(cache_key(n=2), Bundle({"large": torch.ones(1_000_000)}))
except OSError as error:
    print(error.errno)
print(sum(1 for file in cache.root.rglob("*") if file.is_file()))
print(int(cache.load(cache_key(n=1)).tensors["small"].sum()))
"""


def test_a_cache_file_that_does_not_fit_leaves_none_cut_and_those_before_it_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _STORE, str(tmp_path / "disk")]
    lines, said = on_a_small_disk(tmp_path / "disk", 1000, shlex.join(command))
    assert lines == [errno.ENOSPC, 1, 1000, 0], said

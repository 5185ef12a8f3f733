"""Temporary names: what a killed process leaves is removed, and what a living one writes is kept."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from compression.storage.temporary_names import is_temporary, remove_leftovers, temporary_folder
from compression.storage.whole_files import replacing
from search.runtime.files import cache_folder
from search.runtime.run_folder import RunFolder

_WRITER = """\
import sys, time
from pathlib import Path
from compression.storage.temporary_names import temporary_folder
with temporary_folder(Path(sys.argv[1]), sys.argv[2]) as folder:
    (folder / "half").write_bytes(b"0" * 1000)
    print("ready", flush=True)
    time.sleep(60)
"""


@contextmanager
def writer(parent: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that is writing into a temporary folder."""
    command = [sys.executable, "-c", _WRITER, str(parent), name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_living_process_keeps_its_folder_and_a_killed_one_does_not(tmp_path: Path) -> None:
    with writer(tmp_path, "hf") as process:
        [left] = names(tmp_path)
        assert is_temporary(left)
        remove_leftovers(tmp_path, inside=True)
        assert (tmp_path / left / "half").stat().st_size == 1000
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert names(tmp_path) == [left]
        remove_leftovers(tmp_path, "another")
        assert names(tmp_path) == [left]
        remove_leftovers(tmp_path, "hf")
        assert names(tmp_path) == []


def test_the_next_writer_of_the_same_name_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    (tmp_path / ".model.json.a1b2c3d4.tmp").mkdir()
    (tmp_path / ".other.json.a1b2c3d4.tmp").mkdir()
    with replacing(tmp_path / "model.json") as temporary:
        temporary.write_text("whole")
    assert names(tmp_path) == [".other.json.a1b2c3d4.tmp", "model.json"]


def test_each_start_removes_the_leftovers_in_the_cache_and_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHISEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = [
        f"factors/ab/{'a' * 64}.{'b' * 32}.partial",
        f"factors/ab/{'a' * 64}.{'b' * 32}.damaged",
        f"factors/ab/.{'a' * 64}.a1b2c3d4.tmp/unfinished",
        "models/.unpack-a1b2c3d4/model.gguf",
        "wheels/.download-a1b2c3d4/some.whl",
        "run/.hf-a1b2c3d4/config.json",
        "run/.hf.a1b2c3d4.tmp/config.json",
        "run/healed/step-00000010.partial",
        "run/healed/weights.safetensors.partial",
        "../.chisel.ray.a1b2c3d4.tmp/session/socket",
    ]
    kept = [f"factors/ab/{'a' * 64}.{'b' * 32}.safetensors", "run/mine.partial", "run/.tmp", "../.my.a1b2c3d4.tmp"]
    for name in left + kept:
        (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache" / name).touch()
    assert cache_folder() == tmp_path / "cache"
    with RunFolder(tmp_path / "cache" / "run"):
        assert [name for name in left if (tmp_path / "cache" / name).exists()] == []
    assert [name for name in kept if not (tmp_path / "cache" / name).exists()] == []
    assert not list(tmp_path.rglob(".hf*")) + list((tmp_path / "cache").rglob(".unpack*"))


def test_an_exception_leaves_nothing_and_a_folder_is_private(tmp_path: Path) -> None:
    with pytest.raises(KeyError), temporary_folder(tmp_path, "x" * 300) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        raise KeyError
    assert names(tmp_path) == []


def test_a_folder_that_is_taken_for_a_leftover_before_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def stolen(path: Path, flags: int) -> int:
        if not opened:
            os.rmdir(path)
        opened.append(path)
        return real(path, flags)

    real = os.open
    monkeypatch.setattr("compression.storage.temporary_names.os.open", stolen)
    with temporary_folder(tmp_path, "new") as folder:
        monkeypatch.undo()
        assert names(tmp_path) == [folder.name]
        assert len(opened) == 2


def test_a_link_with_the_name_of_a_leftover_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    (tmp_path / ".hf.a1b2c3d4.tmp").symlink_to(tmp_path / "mine")
    remove_leftovers(tmp_path, inside=True)
    assert (tmp_path / "mine" / "file").exists()

"""What a killed process has started does not stay."""

import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from search.workers.orphans import guarded_children

ROOT = Path(__file__).parents[3]
SLEEP = [sys.executable, "-c", "import time; time.sleep(300)"]
PARENT = f"""
import subprocess, sys, time
from pathlib import Path
from search.workers.orphans import guarded_children
with guarded_children(Path(sys.argv[1])):
    child = subprocess.Popen({SLEEP!r}, start_new_session=True)
    print(child.pid, flush=True)
    time.sleep(300)
"""


def alive(process: int) -> bool:
    """Running, and not only waiting to be counted by whoever started it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_children_of_a_killed_process_are_ended_and_their_folder_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "session"
    (folder / "sockets").mkdir(parents=True)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        child = int(parent.stdout.readline())
    assert alive(child)
    time.sleep(2.5)  # the guardian looks once a second
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 60
    while (alive(child) or folder.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(child)
    assert not folder.exists()


@pytest.mark.parametrize("fails", [False, True])
def test_children_are_left_alone_if_the_context_ends(fails: bool) -> None:
    with pytest.raises(KeyError) if fails else nullcontext(), guarded_children():
        child = subprocess.Popen(SLEEP)
        if fails:
            raise KeyError
    try:
        time.sleep(0.5)
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()

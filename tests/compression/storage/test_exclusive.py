import errno
import fcntl
import subprocess
import sys
import threading

import pytest

from compression.storage.exclusive import exclusive

HOLDER = """\
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(descriptor, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    words = [sys.executable, "-S", "-c", HOLDER, str(tmp_path / "lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_killed_holder_frees_the_lock(holder, tmp_path):
    waited = []

    def kill():
        waited.append(1)
        threading.Timer(0.05, holder.kill).start()

    with exclusive(tmp_path / "lock", kill):
        assert waited == [1]
        assert holder.wait(10) == -9


def test_an_interrupt_ends_the_waiting(holder, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), exclusive(tmp_path / "lock", interrupt):
        pytest.fail("the lock was taken")
    assert holder.poll() is None


def test_never_two_hold_it_though_each_holder_removes_the_file(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(50):
            with exclusive(tmp_path / "deep" / "lock"):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    workers = [threading.Thread(target=work) for _ in range(4)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    assert len(most) == 200
    assert set(most) == {1}
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_file_system_without_locks_is_worked_on_without(tmp_path, monkeypatch):
    def unsupported(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with exclusive(tmp_path / "lock"):
        pass

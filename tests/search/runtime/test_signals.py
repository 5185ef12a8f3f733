import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from search.runtime.signals import INTERRUPTED, guarded, shield


@pytest.fixture(autouse=True)
def a_terminal() -> Iterator[None]:
    """SIGHUP is not ignored, as it is where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_a_keyboard_interrupt(number):
    with pytest.raises(KeyboardInterrupt), guarded():
        os.kill(os.getpid(), number)
        pytest.fail("the signal was ignored")


def test_a_shielded_write_is_finished_first():
    done = []
    with pytest.raises(KeyboardInterrupt), guarded(), shield():
        with shield():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with guarded():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_signal_ends_the_process_at_once():
    code = (
        "import os, signal\nfrom search.runtime.signals import guarded, shield\n"
        "with guarded(), shield():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    os.kill(os.getpid(), signal.SIGINT)\n    print('still here')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == INTERRUPTED
    assert run.stdout == ""


def test_a_closing_terminal_may_send_its_signal_twice():
    with pytest.raises(KeyboardInterrupt), guarded(), shield():
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)


def test_a_program_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with guarded():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_failed_write_shows_its_own_error_first():
    with guarded():
        with pytest.raises(OSError, match="disk"), shield():
            raise OSError("disk")
        with shield():
            pass

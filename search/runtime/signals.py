"""Handles Ctrl-C, SIGTERM and SIGHUP: the first one ends the run cleanly after the current write, a second
Ctrl-C or SIGTERM at once.

Knows signals only. Code that must not be interrupted, such as a write, belongs inside `with shield():`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["INTERRUPTED", "guarded", "shield"]

INTERRUPTED = 130
"""Exit code of a run that was ended by Ctrl-C, SIGTERM or SIGHUP."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _State:
    shields = 0
    pending = False
    asked = False


def _on_signal(number: int, _frame: FrameType | None) -> None:
    if _State.asked:
        if number == signal.SIGHUP:  # a closing terminal and its shell both send one, so a second one means no haste
            return
        os._exit(INTERRUPTED)
    _State.asked = True
    if _State.shields:
        _State.pending = True
    else:
        raise KeyboardInterrupt


@contextmanager
def guarded() -> Iterator[None]:
    """Make SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt once; a second SIGINT or SIGTERM exits with code 130.

    A SIGHUP that the program was started to ignore, as by nohup, stays ignored. Does nothing in other threads than the
    main one, since Python delivers signals to the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.asked = _State.pending = False
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    handled = (number for number in _SIGNALS if number != signal.SIGHUP or not ignored)
    before = {number: signal.signal(number, _on_signal) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def shield() -> Iterator[None]:
    """Delay a first interrupt until the end of the block, or of the outermost block if nested."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.shields += 1
    try:
        yield
    finally:
        _State.shields -= 1
    if _State.pending and not _State.shields:
        _State.pending = False
        raise KeyboardInterrupt

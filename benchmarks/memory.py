"""Reads the resident memory of this process from /proc."""

from __future__ import annotations

from pathlib import Path

__all__ = ["peak_resident", "resident"]


def resident() -> int:
    """Current resident memory in bytes.

    Raises:
        OSError: the system has no /proc.
    """
    return _status("VmRSS")


def peak_resident() -> int:
    """Largest resident memory of this program so far, in bytes. (`ru_maxrss` would include the parent process.)

    Raises:
        OSError: the system has no /proc.
    """
    return _status("VmHWM")


def _status(kind: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))

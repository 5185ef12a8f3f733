"""Resident memory of this process."""

from __future__ import annotations

from pathlib import Path

__all__ = ["peak_resident", "resident"]


def resident() -> int:
    """Bytes now.

    Raises:
        OSError: a system without /proc.
    """
    return _status("VmRSS")


def peak_resident() -> int:
    """Most bytes so far of the program that runs. (`ru_maxrss` would include the process that started it.)

    Raises:
        OSError: a system without /proc.
    """
    return _status("VmHWM")


def _status(kind: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))

"""Records how a run was made: command, commit, package versions, processor, GPUs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import MappingProxyType

__all__ = ["environment", "now"]

_PACKAGES = ("gguf", "gymnasium", "numpy", "optuna", "pyarrow", "safetensors", "tokenizers", "torch", "transformers")


def environment(before: Mapping[str, object] = MappingProxyType({})) -> dict[str, object]:
    """Return the time (UTC), command, commit, interpreter, machine, number of threads and versions of this process.

    Args:
        before: what this function returned to a process whose work this one continues. The command then is that of the
            former, and the one of this process is "continued_by"; if the commits differ, the former is "begun_at".
    """
    made = _environment()
    if not isinstance(before.get("command"), str):
        return made
    begun = before.get("begun_at", before.get("commit"))
    changed = {} if begun == made["commit"] else {"begun_at": begun}
    return {**made, "command": before["command"], "continued_by": made["command"], **changed}


def _environment() -> dict[str, object]:
    torch = sys.modules.get("torch")
    module = getattr(sys.modules["__main__"], "__spec__", None)  # set by python -m
    program = [Path(sys.argv[0]).name] if module is None else ["-m", module.name.removesuffix(".__main__")]
    return {
        "date": now(),
        # A word that is not text in the encoding of the locale could not be stored as JSON.
        "command": shlex.join(["python", *program, *sys.argv[1:]]).encode("utf-8", "backslashreplace").decode("utf-8"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch is not None else None,
        "gpus": _gpus(torch),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def now() -> str:
    """Return the current time in UTC, to the second, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _commit() -> str | None:
    """Return the commit of the sources, with "+" appended if tracked files differ from it; None outside git.

    It is asked for once, since this process keeps the sources that it has imported.
    """
    git = ["git", "-C", str(Path(__file__).resolve().parents[2])]
    try:
        run = [
            subprocess.run([*git, *words], capture_output=True, text=True, timeout=10, check=True)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return run[0].stdout.strip() + ("+" if run[1].stdout.strip() else "")


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def _gpus(torch: object) -> list[str]:
    cuda = getattr(torch, "cuda", None)
    if cuda is None or not cuda.is_available():
        return []
    return [str(cuda.get_device_name(index)) for index in range(cuda.device_count())]

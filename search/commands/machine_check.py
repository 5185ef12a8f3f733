"""Checks whether this machine can run the default job, and advises on what is missing.

Checks the interpreter, libraries, processor, devices, memory, disk and data packages. Changes nothing and uses no
network. Libraries are imported inside their check, so that one that cannot be imported becomes a finding.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from search.data.packages import missing
from search.runtime.errors import DataUnavailable
from search.runtime.files import cache_folder
from search.runtime.memory import available_memory
from search.runtime.quick_imports import quick_imports
from search.runtime.run_folder import RESULTS

__all__ = ["Finding", "check_machine"]

_LIBRARIES = ("torch", "transformers", "gguf", "safetensors", "gymnasium", "optuna", "pyarrow", "pydantic", "rich")
_EXTRAS = {
    "agents": (("cmaes", "scipy", "stable_baselines3", "sb3_contrib"), "the agents optuna-cmaes, -gp, -qmc and ppo"),
    "cluster": (("ray",), "evaluators on several machines"),
}
_CACHE_GIB, _RESULTS_GIB, _MEMORY_GIB = 4.0, 0.1, 3.0  # needs of the default job, rounded up
_SPEED, _SECONDS, _QUICK_SECONDS = 150e9, 3300, 1129  # operations a second, and what the default job takes with them
_LONG = 180  # minutes
_ROWS = 1024  # of the matrices that are multiplied


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: what was checked.
        state: "ok"; "note" if a run works without it; "problem" if not.
        found: what is there.
        advice: what to do; empty if nothing needs to be done.
    """

    name: str
    state: str
    found: str
    advice: str = ""


def check_machine() -> list[Finding]:
    """All findings, in the order in which problems are best solved."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _libraries,
        _processor,
        _speed,
        _devices,
        _memory,
        _disk,
        _data,
        _extras,
    )
    return [finding for check in checks for finding in check()]


def _python() -> Iterator[Finding]:
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    advice = "" if fits else "use Python 3.11, 3.12 or 3.13: make setup PYTHON=/path/to/python3.12"
    yield Finding("python", "ok" if fits else "problem", sys.version.split()[0], advice)


def _libraries() -> Iterator[Finding]:
    for name in _LIBRARIES:
        try:
            with quick_imports():
                import_module(name)
            yield Finding(name, "ok", version(name))
        except Exception as error:  # a half installed library may raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            yield Finding(name, "problem", f"cannot be imported: {reason}", "make setup")


def _processor() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        import torch
    except Exception:  # `_libraries` reports it
        return
    threads = torch.get_num_threads()
    fast = bool(torch.cpu._is_avx512_bf16_supported())
    found = f"{cores} cores, {threads} threads, {'bfloat16' if fast else 'float32 only, about three times slower'}"
    more = threads > cores
    yield Finding("processor", "note" if more else "ok", found, f"--threads {cores} or fewer" if more else "")


def _speed() -> Iterator[Finding]:
    try:
        import torch

        if torch.cuda.is_available():  # the job runs there, and the figures below are of processors
            return
    except Exception:  # `_libraries` and `_devices` report it
        return
    matrix, times = torch.rand(_ROWS, _ROWS), []
    for _ in range(5):
        started = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - started)
    speed = 2 * _ROWS**3 / min(times)
    whole, quick = (seconds * _SPEED / speed / 60 for seconds in (_SECONDS, _QUICK_SECONDS))
    found = f"{speed / 1e9:.0f} GFLOP/s now: about {whole:.0f} minutes for the default job, {quick:.0f} with --quick"
    slow = whole > _LONG
    yield Finding("speed", "note" if slow else "ok", found, "stop other jobs, or use --quick" if slow else "")


def _devices() -> Iterator[Finding]:
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for index in range(count):
            free, total = (each / 2**30 for each in torch.cuda.mem_get_info(index))
            found = f"{torch.cuda.get_device_name(index)}, {free:.1f} of {total:.1f} GiB free"
            yield Finding(f"cuda:{index}", "ok", found)
    except Exception as error:  # a driver that does not match may raise anything
        yield Finding("cuda", "note", str(error).splitlines()[0], "repair the driver, or use --device cpu")
        return
    if not count:
        yield Finding("gpu", "ok", "none; models run on the CPU")


def _memory() -> Iterator[Finding]:
    if (available := available_memory()) is None:
        return
    free = available / 2**30
    short = free < _MEMORY_GIB
    advice = f"free memory: the default job takes about {_MEMORY_GIB:.0f} GiB; or use --quick" if short else ""
    yield Finding("memory", "note" if short else "ok", f"{free:.1f} GiB available", advice)


def _disk() -> Iterator[Finding]:
    try:
        cache = cache_folder()
    except DataUnavailable as error:
        yield Finding("cache", "problem", str(error), "name a writable folder in CHISEL_CACHE")
        return
    for name, folder, needed, advice in (
        ("cache", cache, _CACHE_GIB, "free disk space, or name another folder in CHISEL_CACHE"),
        ("results", RESULTS.absolute(), _RESULTS_GIB, "free disk space, or use --out"),
    ):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free / 2**30
        if not os.access(there, os.W_OK):
            yield Finding(name, "problem", f"{folder} cannot be written", advice)
        else:
            used = name == "cache" and any((folder / part).is_dir() for part in ("factors", "models"))
            short = free < needed and not used  # an earlier run has filled the cache
            found = f"{folder}, {free:.1f} GiB free" + (", in use" if used else f", about {needed:g} GiB needed")
            yield Finding(name, "problem" if short else "ok", found, advice if short else "")


def _data() -> Iterator[Finding]:
    try:
        absent = missing()
    except DataUnavailable as error:
        named = "CHISEL_DATA" if os.environ.get("CHISEL_DATA") else "CHISEL_CACHE"
        yield Finding("data", "problem", str(error), f"correct {named}")
        return
    if absent:
        found = f"not downloaded yet: {', '.join(package.wheel for package in absent)}"
        yield Finding("data", "note", found, "python search.py data downloads them; so does the first run")
    else:
        yield Finding("data", "ok", "all packages are here, with the right hashes")


def _extras() -> Iterator[Finding]:
    for extra, (modules, needed_for) in _EXTRAS.items():
        absent = [module for module in modules if importlib.util.find_spec(module) is None]
        if absent:
            advice = f"pip install 'chisel-prior[{extra}]', for {needed_for}"
            yield Finding(f"extra {extra}", "note", f"without {', '.join(absent)}", advice)
        else:
            yield Finding(f"extra {extra}", "ok", ", ".join(f"{one} {_version(one)}" for one in modules))


def _version(module: str) -> str:
    try:
        return version(module.replace("_", "-"))
    except PackageNotFoundError:
        return "(unknown version)"

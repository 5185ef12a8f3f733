"""Starts Ray on this machine, where it listens on loopback only and ends with the search, or joins a cluster."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

from compression.refusal import Refusal
from compression.storage.temporary_names import temporary_folder
from search.config import Config
from search.runtime.errors import EvaluatorsLost
from search.runtime.signals import shield
from search.workers.orphans import guarded_children

__all__ = ["cluster", "session_folder", "start_here"]

_LONGEST = 12  # characters of the folder that holds the session folder; the rest takes up to 94 of a socket's 107
_STARTS = 3  # attempts to start Ray on this machine
_OBJECTS = 80 * 2**20  # bytes of Ray's object store here, close to the minimum: only text goes through it


@contextmanager
def cluster(config: Config, processors: int) -> Iterator[dict[str, float]]:
    """Initialize Ray, unless it already is, and yield the resources of the cluster. Signal handlers are kept.

    Args:
        processors: CPUs that the evaluators need, if Ray is started here.

    Raises:
        ValueError: the cluster of `config.ray_address` cannot be joined.
        EvaluatorsLost: Ray cannot be started here.
    """
    if ray.is_initialized():
        yield _resources()
        return
    if config.ray_address is not None:
        with _initialized(config, processors, None):
            yield _resources()
        return
    with session_folder() as folder, guarded_children(folder), _initialized(config, processors, folder):
        yield _resources()


@contextmanager
def session_folder() -> Iterator[Path]:
    """A folder for the sessions, logs and sockets of a Ray that starts here: private to the user, removed at the end.

    Its path is short, since that of a socket may have about a hundred characters.
    """
    usual = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    with temporary_folder(usual if len(str(usual)) <= _LONGEST else Path("/tmp"), "chisel.ray") as folder:
        yield folder


@contextmanager
def _initialized(config: Config, processors: int, folder: Path | None) -> Iterator[None]:
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if main}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with shield():
        if folder is not None:
            room = processors + len(os.sched_getaffinity(0))
            local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _OBJECTS, **quiet}
            start_here(folder, num_cpus=room, **local)
        else:
            assert config.ray_address is not None
            address = config.ray_address if ":" in config.ray_address else f"{config.ray_address}:6379"
            try:
                ray.init(address="auto" if config.ray_address == "auto" else address, runtime_env=_sources(), **quiet)
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise Refusal(f"ray_address {config.ray_address!r} cannot be used: {reason}") from None
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def start_here(folder: Path, **how: Any) -> None:
    """Start Ray on this machine, listening on loopback only; try again if it is not up within its limit of 30 seconds.

    It gets a token of its own unless the environment names one, so that nothing in the home folder is read or written.

    Args:
        folder: see `session_folder`.
        how: arguments of `ray.init`.

    Raises:
        EvaluatorsLost: Ray did not start.
    """
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    for left in reversed(range(_STARTS)):
        try:
            with _loopback():
                ray.init(address="local", _temp_dir=str(folder / "ray"), **how)
            for inside, _, _ in os.walk(folder):  # Ray opens its folders to everybody
                Path(inside).chmod(0o700)
            return
        except Exception as error:  # Ray raises plain Exception
            ray.shutdown()
            if not left:
                raise EvaluatorsLost(f"Ray cannot be started here: {str(error).splitlines()[0]}") from error


@contextmanager
def _loopback() -> Iterator[None]:
    """Make Ray use 127.0.0.1 as the address of this machine while it starts, so that it listens on no other.

    Ray has a switch for this, meant for systems without clusters. The processes that Ray starts read it from the
    environment; this process read it when ray was imported.
    """
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    variable, switch = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = switch
        if variable is None:
            del os.environ[name]
        else:
            os.environ[name] = variable


def _resources() -> dict[str, float]:
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return {"CPU": 0.0, "GPU": 0.0, **found}


def _sources() -> dict[str, Any] | None:
    """The runtime environment that copies this checkout to other nodes; None if a submitted job has copied it."""
    root = Path(__file__).resolve().parents[2]
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or not (root / "search.py").is_file():
        return None
    return {"working_dir": str(root)}

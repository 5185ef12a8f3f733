"""A cluster of Ray on this machine, one node after the other by `ray start`, as docs/cluster.md does it on several."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import psutil

__all__ = ["RAY", "LocalCluster"]

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_TRIES = 4  # Ray gives up when a node is not up in half a minute; a busy machine needs more


class LocalCluster:
    """A head without room for evaluators while the context lasts, and the nodes that are added to it.

    Args:
        processors: of the head.
        home: the home folder of its processes, if it is to be another one.

    Attributes:
        address: for `--ray-address`.
        environment: for every process that joins it or submits a job to it.
        nodes: those that were added and not killed.
    """

    def __init__(self, processors: int = 0, home: Path | None = None) -> None:
        port, web = _free_ports(2)
        self.address = f"127.0.0.1:{port}"
        self.environment = {
            **os.environ,
            "HOME": str(home or Path.home()),
            # A node is started from the environment of the project: the `python` of a job is its own.
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{web}",
        }
        self.nodes: list[psutil.Process] = []
        self._flags = f"--head --port={port} --num-cpus={processors} --dashboard-host=127.0.0.1 --dashboard-port={web}"
        self._stack = ExitStack()

    def __enter__(self) -> LocalCluster:
        with ExitStack() as stack:
            # Sockets lie in Ray's folder, and their names must be short.
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True))
            head = self._start(*self._flags.split(), "--include-dashboard=true", f"--temp-dir={folder}")
            stack.callback(_end, head)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in self.nodes:
            _end(node)
        self._stack.close()

    def add(self, processors: int) -> None:
        """One more node."""
        self.nodes.append(self._start(f"--address={self.address}", f"--num-cpus={processors}"))

    def kill(self, node: psutil.Process) -> None:
        """SIGKILL to a node and everything that runs on it."""
        self.nodes.remove(node)
        _end(node)

    def _start(self, *flags: str) -> psutil.Process:
        words = [*RAY, "start", "--node-ip-address=127.0.0.1", "--block", *flags]
        for _ in range(_TRIES):
            process = psutil.Popen(
                words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment
            )
            if any("Ray runtime started" in line for line in process.stdout):
                return process
            _end(process)
        raise RuntimeError(f"no node of Ray can be started in {_TRIES} tries")


def _end(process: psutil.Process) -> None:
    family = [process, *process.children(recursive=True)]
    for each in family:
        each.kill()
    psutil.wait_procs(family, timeout=30)
    process.stdout.close()  # type: ignore[attr-defined]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]

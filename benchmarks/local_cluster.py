"""Starts a Ray cluster on this machine, one node at a time with `ray start`, as docs/cluster.md does on several."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import psutil

__all__ = ["RAY", "LocalCluster"]

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_TRIES = 4  # Ray gives up if a node is not up after 30 s; a busy machine may need longer


class LocalCluster:
    """Context manager for a cluster: a head node, by default without processors for evaluators, and the added nodes.

    Args:
        processors: number of processors that the head offers, at least 0.
        home: home folder of the cluster's processes; None keeps the user's.

    Attributes:
        address: address of the cluster for `--ray-address`.
        environment: environment variables for every process that joins the cluster or submits a job to it.
        nodes: nodes that were added and not killed.
    """

    def __init__(self, processors: int = 0, home: Path | None = None) -> None:
        port, web = _free_ports(2)
        self.address = f"127.0.0.1:{port}"
        self.environment = {
            **os.environ,
            "HOME": str(home or Path.home()),
            # Puts this interpreter first, so that the `python` of a job is the one of this project.
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
            # Ray puts its sockets into this folder, and their paths must be short.
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
        """Adds a node with this number of processors."""
        self.nodes.append(self._start(f"--address={self.address}", f"--num-cpus={processors}"))

    def kill(self, node: psutil.Process) -> None:
        """Sends SIGKILL to a node and to everything that runs on it."""
        self.nodes.remove(node)
        _end(node)

    def _start(self, *flags: str) -> psutil.Process:
        for _ in range(_TRIES):
            # Without a port of its own, a node's agent has that of any other node on this machine, and takes no jobs.
            agent = f"--dashboard-agent-listen-port={_free_ports(1)[0]}"
            words = [*RAY, "start", "--node-ip-address=127.0.0.1", "--block", agent, *flags]
            process = psutil.Popen(
                words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment
            )
            if any("Ray runtime started" in line for line in process.stdout):
                return process
            _end(process)
        raise RuntimeError(f"no Ray node could be started in {_TRIES} tries")


def _end(process: psutil.Process) -> None:
    family = [process]
    with suppress(psutil.NoSuchProcess):
        family += process.children(recursive=True)
    for each in family:
        with suppress(psutil.NoSuchProcess):  # workers end by themselves, too, and with the node that was killed first
            each.kill()
    psutil.wait_procs(family, timeout=30)
    process.stdout.close()  # type: ignore[attr-defined]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]

"""A worker for pools that scores nothing and does what its jobs say. Imports no library, so it starts quickly."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any


class Scripted:
    """χ says what a schedule does: 1 kills its worker, 2 kills it the first time, 3 hangs; the KL of others is their χ.

    Args:
        folder: gets a file for every time that a schedule is tried.
        row: of a score, to which the KL is added.
        trouble: what it does as it gets ready: "dies", "refuses", or "differs" from others.
    """

    def __init__(self, folder: str, row: dict[str, Any], trouble: str = "") -> None:
        self.folder, self.row, self.trouble = Path(folder), row, trouble

    def ready(self) -> dict[str, Any]:
        if self.trouble == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "refuses":
            raise ValueError("target_kept must be something else")
        return {"identity": os.getpid() if self.trouble == "differs" else "same", "dense": self.row}

    def work(self, jobs: list[str]) -> list[str]:
        return [self._score(job) for job in jobs]

    def _score(self, job: str) -> str:
        values = json.loads(job)
        [(_, _, chi, _)] = json.loads(values["schedule"])
        visits = len(list(self.folder.glob(f"{chi}.*")))
        (self.folder / f"{chi}.{visits}").touch()
        if chi == 1 or (chi == 2 and not visits):
            os.kill(os.getpid(), signal.SIGKILL)
        if chi == 3:
            time.sleep(1000)
        return json.dumps({"score": self.row | {"kl": chi + values["look"] / 10}, "slopes": None})

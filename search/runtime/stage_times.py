"""Adds up how long every stage of a run takes, in a file of its folder. Knows names and seconds."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

from compression.storage.strict_json import bounded_text
from search.runtime.files import write_whole

__all__ = ["StageTimes"]

_HEADING = ["stage", "seconds"]


class StageTimes:
    """Seconds by stage, those of earlier sessions of the run included. A file that cannot be read is begun anew.

    Args:
        path: the file, CSV with a line for each stage in the order in which they first ended.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds: dict[str, float] = {}
        try:
            heading, *lines = csv.reader(io.StringIO(bounded_text(path, "the times of the stages")))
            read = {name: float(seconds) for name, seconds in lines}
        except (OSError, ValueError, csv.Error):
            return
        if heading == _HEADING and all(math.isfinite(seconds) and seconds >= 0 for seconds in read.values()):
            self._seconds = read

    def add(self, stage: str, seconds: float) -> None:
        """Add to the seconds of a stage, and write the file whole."""
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
        text = io.StringIO()
        rows = [(name, f"{value:.1f}") for name, value in self._seconds.items()]
        csv.writer(text, lineterminator="\n").writerows([_HEADING, *rows])
        write_whole(self._path, text.getvalue())

"""Shows the progress of a run: stage, count, best result so far, time left.

Draws a progress bar on a terminal, prints plain lines elsewhere, and prints nothing when quiet. Receives numbers and
text; knows no models and no trials.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from search.runtime.outside_text import plain

__all__ = ["Console", "Stage", "duration"]


def duration(seconds: float) -> str:
    """Format seconds with at most two units: "8 s", "2 min 05 s", "1 h 20 min". Negative values count as 0."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Console:
    """Prints all progress of a run. Use it as a context manager, so that the terminal is restored at the end.

    Args:
        stream: where to write; standard error by default, so that standard output holds results only.
        quiet: print nothing.
        live: redraw a bar in place; by default only if `stream` is a terminal.
        clock: returns monotonic time in seconds.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        quiet: bool = False,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.quiet = quiet
        self.clock = clock
        self._stages: list[Stage] = []
        self._ended: list[tuple[str, float]] = []  # until something counts the times
        self._count: Callable[[str, float], None] | None = None
        self.folder: Path | None = None
        """The run folder, once the run has one; the hint on how to resume names it."""
        terminal = self.stream.isatty() and os.environ.get("TERM", "") != "dumb"
        self._progress: Progress | None = None
        if not quiet and (terminal if live is None else live):
            self._progress = Progress(
                SpinnerColumn(finished_text="✓"),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}", markup=False),
                console=RichConsole(file=self.stream, force_terminal=True),
            )

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()

    def opened(self, folder: Path) -> None:
        """Print the path of the run folder; from here on, an interrupted run can be resumed."""
        self.folder = folder
        self.note(f"run folder: {folder}")

    def note(self, text: str) -> None:
        """Print one line, above the bar if there is one; control characters in it are shown, not obeyed."""
        if self.quiet:
            return
        text = plain(text)
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def time_stages(self, count: Callable[[str, float], None]) -> None:
        """Call `count` with the name and the seconds of every stage that ends or has ended already."""
        self._count = count
        for name, seconds in self._ended:
            count(name, seconds)
        self._ended.clear()

    def ended(self, name: str, seconds: float) -> None:
        """Say that a stage has ended, finished or not; called by stages."""
        if self._count is None:
            self._ended.append((name, seconds))
        else:
            self._count(name, seconds)

    def decomposed(self, done: int, total: int) -> None:
        """Show in the current stage that `done` of the `total` matrices that its next unit of work needs are there."""
        if self._stages and done < total:
            self._stages[-1].show(f"decomposed {done}/{total} matrices")

    def stage(self, name: str, total: int | None = None, unit: str = "", done: int = 0, every: float = 10.0) -> Stage:
        """Return a stage of the run, which is a context manager.

        Args:
            name: one word, such as "calibrate" or "search".
            total: number of units of work, at least 0; None if unknown, and then no time left is shown.
            unit: name of the units, such as "trials".
            done: number of units that an earlier session finished; the estimate of the time left ignores them.
            every: without a bar, print at most one line in this many seconds; 0 prints a line at every advance.
        """
        return Stage(self, name, total, unit, done, every)


class Stage:
    """Progress of one stage; `Console.stage` makes it."""

    def __init__(self, console: Console, name: str, total: int | None, unit: str, done: int, every: float) -> None:
        self._console, self._name, self._total, self._unit, self._every = console, name, total, unit, every
        self._before = self._done = done
        self._detail = ""
        self._started = self._printed = console.clock()
        self._bar = None
        if console._progress is not None:
            self._bar = console._progress.add_task(f"{name:<10}", total=total, completed=done, text="")

    def __enter__(self) -> Self:
        if self._console._progress is None:
            self._console.note(f"{self._name} ...")
        self._console._stages.append(self)
        return self

    def advance(self, count: int = 1, detail: str = "") -> None:
        """Count `count` more units as finished; `detail`, such as "best KL 0.41", is shown until it is replaced."""
        self._done += count
        self._detail = detail or self._detail
        self.show()

    def show(self, work: str = "") -> None:
        """Show how far the stage is, and what it works on."""
        progress, now = self._console._progress, self._console.clock()
        text = " · ".join(part for part in (self._text(now), plain(work)) if part)
        if progress is not None and self._bar is not None:
            progress.update(self._bar, completed=self._done, text=text)
        elif now - self._printed >= self._every:
            self._printed = now
            self._console.note(f"{self._name} {text}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._console._stages.remove(self)
        progress, seconds = self._console._progress, self._console.clock() - self._started
        verb = "stopped after" if kind else "done in"
        text = plain(" · ".join(part for part in (f"{verb} {duration(seconds)}", self._detail) if part))
        if progress is not None and self._bar is not None:
            total = self._done if kind else (self._total or max(self._done, 1))
            progress.update(self._bar, total=max(total, 1), completed=total, text=text)
        else:
            self._console.note(f"{self._name} {text}")
        self._console.ended(self._name, seconds)

    def _text(self, now: float) -> str:
        if self._total is None:
            of = f"{self._done}" if self._unit else ""  # a stage without a unit counts nothing
        else:
            of = f"{self._done}/{self._total}"
        fresh, left = self._done - self._before, ""
        if self._total is not None and fresh > 0 and self._done < self._total:
            left = f"{duration((now - self._started) / fresh * (self._total - self._done))} left"
        return plain(" · ".join(part for part in (f"{of} {self._unit}".strip(), self._detail, left) if part))

"""Runs everything that only a GPU can show, in pieces of a few minutes, and writes one table of it.

    python -m benchmarks.gpu_day --out DIR [--minutes 9] [--only PIECE ...] [--list] [--write]

Every call goes on where the last one stopped and ends after `--minutes`: a job is interrupted and resumed by the next
call, a benchmark that is interrupted starts again. Call it until it says that nothing is left. The pieces are the whole
default job on the shapes of Llama-3.2-1B and LLaMA-2-7B and on the two Qwen models whose files
`benchmarks.lab_models` has fetched, timed by stage; the same search with one evaluator, with four on a quarter of the
GPU each, and with four and so little memory that batches must be halved; speed of factors and of plain matrices; and
five minutes of healing, the last ones with tables of their own in results/. `--write` writes what is there so far.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.lab_models import LAB_MODELS
from benchmarks.report import Bar, markdown, publish
from search.reporting.opened_run import OpenedRun
from search.runtime.console import duration
from search.runtime.files import cache_folder, write_whole
from search.runtime.run_folder import CONFIG, STAGES, SUMMARY, TRIALS

_ROOT = Path(__file__).resolve().parents[1]
_STATE = "pieces.json"
_GRACE = 60.0
"""Seconds that an interrupted piece has to end."""
_SEARCH = ("--agent", "random", "--budget", "40", "--heal-minutes", "0", "--benchmark-items", "0", "--export", "none")
_FOUR = ("--evaluators", "4", "--gpus-per-evaluator", "0.25")
_HOUR = 60.0
"""Most minutes of a search of 200 evaluations at 7 billion parameters."""
_SMALL = "random:llama-3.2-1b"


@dataclass(frozen=True)
class Piece:
    """A job or a benchmark.

    Attributes:
        name: names it, and the folder of a job.
        words: what follows `python`: flags of search.py for a job, and a module with its flags for a benchmark.
        job: whether it leaves a run folder, which `--resume` continues.
        room: GB of the GPU that are left to it; None for all.
    """

    name: str
    words: tuple[str, ...]
    job: bool = True
    room: float | None = None

    def command(self, out: Path) -> list[str]:
        """The command that begins the piece, or continues it."""
        folder = out / self.name
        if not self.job:
            return [sys.executable, "-m", *(word.replace("{out}", str(out)) for word in self.words)]
        how = ("--resume", str(folder)) if (folder / CONFIG).exists() else (*self.words, "--out", str(folder))
        return [sys.executable, "search.py", *how]


def pieces(models: Path, room: float) -> list[Piece]:
    """All pieces in their order.

    Args:
        models: folder with the files of `benchmarks.lab_models`; those that are missing are left out.
        room: GB of the GPU for the search that must halve its batches.
    """
    shapes = [Piece("job-1b", ("--model", _SMALL)), Piece("job-7b", ("--model", "random:llama-2-7b"))]
    there = [name for name in LAB_MODELS if name.startswith("qwen") and (models / f"{name}.gguf").exists()]
    real = [Piece(f"job-{name}", ("--model", str(models / f"{name}.gguf"))) for name in there]
    searches = [
        Piece("one-evaluator", ("--model", _SMALL, *_SEARCH)),
        Piece("four-evaluators", ("--model", _SMALL, *_SEARCH, *_FOUR)),
        Piece("little-memory", ("--model", _SMALL, *_SEARCH, *_FOUR), room=room),
    ]
    layers = [
        Piece(
            f"speed-{form}-{model.rsplit(':', 1)[-1]}",
            ("benchmarks.layer_latency", "--model", model, "--device", "cuda:0", "--form", form, "--write"),
            job=False,
        )
        for model in (_SMALL, "random:llama-2-7b")
        for form in ("plain", "factors")
    ]
    healing = Piece(
        "healing", ("benchmarks.healing", "--minutes", "5", "--items", "500", "--out", "{out}/healed", "--write"), False
    )
    return [shapes[0], *searches, *layers, healing, *real, shapes[1]]


class Day:
    """The state of all pieces, kept in a folder.

    Args:
        out: folder of the state and of the jobs; created if missing.
    """

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        file = out / _STATE
        self.state: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def left(self, wanted: Sequence[Piece]) -> list[Piece]:
        """The pieces that have neither ended nor failed."""
        return [piece for piece in wanted if self.state.get(piece.name, {}).get("code") in (None, 130)]

    def run(self, piece: Piece, seconds: float) -> int:
        """Begin or continue a piece for at most so many seconds, and a minute to end; returns its exit code."""
        before = self.state.get(piece.name, {"seconds": 0.0, "sessions": 0, "memory": 0})
        start = time.monotonic()
        with _little_memory(piece.room) if piece.room else nullcontext(), _watched() as memory:
            code = _within(piece.command(self.out), seconds, self.out / f"{piece.name}.log")
        self.state[piece.name] = {
            "code": code,
            "seconds": before["seconds"] + time.monotonic() - start,
            "sessions": before["sessions"] + 1,
            "memory": max(before["memory"], *memory, 0),
        }
        write_whole(self.out / _STATE, json.dumps(self.state, indent=2))
        return code

    def report(self, wanted: Sequence[Piece]) -> tuple[str, list[Bar]]:
        """The tables of all pieces that have begun, and the bars that they reach or miss."""
        rows = [
            (piece.name, _outcome(state["code"]), duration(state["seconds"]), state["sessions"], state["memory"])
            for piece in wanted
            if (state := self.state.get(piece.name))
        ]
        parts = [markdown(("piece", "outcome", "time", "sessions", "GPU memory used, MB"), rows)]
        times = {
            piece.name: dict(OpenedRun(folder).stages().itertuples(index=False, name=None))
            for piece in wanted
            if piece.job and ((folder := self.out / piece.name) / STAGES).exists()
        }
        if times:
            stages = list(dict.fromkeys(stage for each in times.values() for stage in each))
            cells = [
                [stage, *(f"{each[stage]:.0f}" if stage in each else "" for each in times.values())] for stage in stages
            ]
            parts.append(f"Seconds by stage:\n\n{markdown(('stage', *times), cells)}")
        if same := same_scores(self.out, [name for name in times if (self.out / name / TRIALS).exists()]):
            parts.append(same)
        bars = []
        if (minutes := times.get("job-7b", {}).get("search")) and (self.out / "job-7b" / SUMMARY).exists():
            bars.append(Bar("search_of_200_evaluations_at_7b_minutes", minutes / 60, "<=", _HOUR))
        return "\n\n".join(parts), bars


def same_scores(out: Path, names: Sequence[str]) -> str:
    """How much scores of the same schedules on the same shard differ between the searches that score them."""
    alike = [name for name in names if name in ("one-evaluator", "four-evaluators", "little-memory")]
    if len(alike) < 2:
        return ""
    first, *others = (OpenedRun(out / name).trials().drop_duplicates(["digest", "shard"]) for name in alike)
    lines = []
    for name, other in zip(alike[1:], others, strict=True):
        both = pd.merge(first, other, on=["digest", "shard"], suffixes=("", "_other"))
        furthest = (both["kl"] - both["kl_other"]).abs().max() if len(both) else float("nan")
        lines.append((name, len(both), f"{furthest:.2g}"))
    heading = ("search", f"schedules that {alike[0]} scored too", "largest difference of KL, nats per token")
    return markdown(heading, lines)


def _outcome(code: int) -> str:
    return {0: "done", 130: "interrupted"}.get(code, f"failed ({code})")


def _within(command: Sequence[str], seconds: float, log: Path) -> int:
    """Run a command, interrupt it after so many seconds, and kill it a minute later; returns 130 if it was stopped."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, cwd=_ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return 0 if process.returncode == 0 else 130


@contextmanager
def _little_memory(room: float) -> Iterator[None]:
    """Inside the context, another process holds all of the GPU's memory but `room` GB."""
    filling = (
        "import sys, torch; free, _ = torch.cuda.mem_get_info();"
        f"held = torch.empty(max(0, free - int({room} * 1e9)), dtype=torch.uint8, device='cuda');"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", filling], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.communicate()


@contextmanager
def _watched(every: float = 2.0) -> Iterator[list[int]]:
    """Yields a list to which the MB of GPU memory in use are appended; empty without nvidia-smi."""
    found: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
        while not ended.is_set():
            try:
                said = subprocess.run(query, capture_output=True, text=True, timeout=30)
                found.append(int(said.stdout.strip()))
            except (OSError, ValueError, subprocess.TimeoutExpired):
                return
            ended.wait(every)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def work(day: Day, wanted: Sequence[Piece], minutes: float) -> Mapping[str, int]:
    """Run what is left, in order, for so many minutes; returns the exit codes of the pieces that ran."""
    end, codes = time.monotonic() + 60 * minutes, {}
    for piece in day.left(wanted):
        if (seconds := end - time.monotonic()) < 1:
            break
        codes[piece.name] = day.run(piece, seconds)
        print(f"{piece.name}: {_outcome(codes[piece.name])}", flush=True)
    return codes


def main() -> None:
    """Runs the next pieces and prints the tables of all so far."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of jobs and state")
    parser.add_argument("--minutes", type=float, default=9.0, help="minutes of this call (default: 9)")
    parser.add_argument("--room", type=float, default=24.0, help="GB for the search with little memory (default: 24)")
    parser.add_argument("--only", nargs="+", metavar="PIECE", help="pieces to run; a failed one is tried again")
    parser.add_argument("--list", action="store_true", help="name the pieces and stop")
    parser.add_argument("--write", action="store_true", help="write results/gpu_day-GPU.md")
    given = parser.parse_args()
    every = pieces(cache_folder() / "models", given.room)
    if unknown := set(given.only or ()) - {piece.name for piece in every}:
        parser.error(f"there is no piece {', '.join(sorted(unknown))}; --list names all")
    if given.list:
        print("\n".join(f"{piece.name}: {' '.join(piece.words)}" for piece in every))
        return
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    day = Day(given.out.absolute())
    for name in given.only or ():
        if day.state.get(name, {}).get("code") != 0:
            day.state.pop(name, None)
    work(day, [piece for piece in every if not given.only or piece.name in given.only], given.minutes)
    body, bars = day.report(every)
    publish("benchmarks.gpu_day", "Pieces of work on a GPU", body, bars, given.write)
    print(f"{len(day.left(every))} of {len(every)} pieces are left")


if __name__ == "__main__":
    main()

"""Run a benchmark: measure every model on every task and write the outcomes.

Combines models, documents, stock tasks and outcomes. Each outcome is stored immediately in the output folder and in the
user's cache, under a key of the model's digest, the items and the device, so nothing is measured twice.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compression.refusal import Refusal, nearest
from compression.storage.exclusive import exclusive
from compression.storage.factor_cache import cache_key
from search.benchmarking.compared_models import ComparedModel, compared_models
from search.benchmarking.documents import SOURCES, always_searched, select
from search.benchmarking.outcome import Outcome, mean_and_error, paired
from search.benchmarking.selection import Selection
from search.benchmarking.tasks import named_tasks
from search.evaluation.shared_rows import APART, keeps_rows_apart
from search.experiment.experiment import Experiment
from search.model.devices import resolve_device
from search.model.loading import LoadedModel
from search.reporting.frames import csv_text
from search.reporting.tables import Column, text_table
from search.runtime.console import Console
from search.runtime.files import cache_folder, finite, write_whole
from search.runtime.provenance import environment
from search.runtime.run_folder import CONFIG, RESULTS, STUDY, RunFolder, contents, refuse_held, refuse_unwritable

__all__ = ["BENCHMARKS", "BenchmarkRequest", "Result", "benchmark"]

BENCHMARKS = "benchmarks"
"""Name of the CSV and JSON files of a benchmark, without suffix."""


@dataclass(frozen=True)
class BenchmarkRequest:
    """The settings of a benchmark.

    Attributes:
        models: model names, run folders or priors, see `search.benchmarking.compared_models.compared_models`.
        tasks: names of tasks and groups.
        samples: number of items per task, at least 2; None measures all items.
        schedules: which schedules of a run to measure.
        source: one of `search.benchmarking.documents.SOURCES`.
        seed: seed of the sample of items.
        device: as for `search.model.devices.resolve_device`.
        out: output folder; None uses the folder of the run if a single run is named, otherwise a new folder in
            results/.
    """

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    samples: int | None
    schedules: tuple[str, ...]
    source: str = "auto"
    seed: int = 0
    device: str = "auto"
    out: str | None = None
    trusted: bool = False


@dataclass(frozen=True)
class Result:
    """The result of a benchmark.

    Attributes:
        folder: the output folder.
        outcomes: the outcomes in the order of models and tasks.
        notes: one sentence for each task with items excluded because a search used them.
    """

    folder: Path
    outcomes: tuple[Outcome, ...]
    notes: tuple[str, ...]

    @property
    def nonfinite(self) -> int:
        """Number of outcomes without numbers."""
        return sum(outcome.state != "ok" for outcome in self.outcomes)

    def differences(self) -> list[dict[str, object]]:
        """Paired differences over items of every other model minus the first, if both have numbers."""
        first = {one.task: one for one in self.outcomes if one.model == self.outcomes[0].model}
        return [
            {"task": one.task, "model": one.model, "minus": base.model} | asdict(paired(one, base))
            for one in self.outcomes
            if (base := first[one.task]) is not one and one.state == base.state == "ok"
        ]

    def text(self) -> str:
        """Both tables as aligned text."""
        models = list(dict.fromkeys(outcome.model for outcome in self.outcomes))
        rows: dict[str, dict[str, object]] = {}
        for outcome in self.outcomes:
            row = rows.setdefault(outcome.task, {"task": outcome.task, "metric": outcome.metric})
            row[outcome.model], row[f"{outcome.model} error"] = mean_and_error(outcome.values)
            row["n"] = max(int(str(row.get("n", 0))), len(outcome.values))
            if outcome.state != "ok":
                row[outcome.model] = outcome.state
        columns = [Column("task", "task"), Column("metric", "metric"), Column("n", "n", ",d")]
        text = text_table(
            list(rows.values()), [*columns, *(Column(model, model, ".3f", f"{model} error") for model in models)]
        )
        if differences := self.differences():
            shown = [row | {"interval": f"{row['low']:+.3f} to {row['high']:+.3f}"} for row in differences]
            compared = [Column("task", "task"), Column("model", "model"), Column("value", f"minus {models[0]}", "+.3f")]
            text += "\n" + text_table(
                shown, [*compared, Column("interval", "95 % interval"), Column("items", "n", ",d")]
            )
        return text + "".join(f"{note}\n" for note in self.notes)

    def document(self) -> dict[str, object]:
        """The tables as plain values, without the items."""
        return {
            "folder": str(self.folder),
            "rows": [outcome.row() for outcome in self.outcomes],
            "differences": self.differences(),
            "notes": list(self.notes),
        }


def benchmark(request: BenchmarkRequest, console: Console, opened: Experiment | None = None) -> Result:
    """Measure every outcome that is not stored yet; the files in the folder are complete after every outcome.

    Args:
        opened: the experiment of the run that is measured, with its dense model, if it is already in memory. Only
            valid if a single run is measured.

    Raises:
        ValueError: the request is refused.
        DataUnavailable: data or a model cannot be read or downloaded.
    """
    _check(request)
    path = _folder(request)
    refuse_unwritable(path)
    refuse_held(path)
    device = resolve_device(request.device)
    tasks = named_tasks(request.tasks)
    spread = request.device == "auto"
    compared = compared_models(request.models, request.schedules, device, console, opened, spread, request.trusted)
    with console.stage("items"):
        searched = always_searched().union(*(one.searched for one in compared))
        selections = [select(task, request.samples, request.seed, searched, request.source) for task in tasks]
    with RunFolder(path) as folder:
        console.note(f"output folder: {path}")
        bench = _Bench(folder, request, selections, console)
        for one in compared:
            bench.measure(one)
    return bench.result()


class _Bench:
    """Collects and writes the outcomes of one benchmark, including stored ones."""

    def __init__(
        self, folder: RunFolder, request: BenchmarkRequest, selections: Sequence[Selection], console: Console
    ) -> None:
        self._folder, self._request, self._selections, self._console = folder, request, selections, console
        self._outcomes: list[Outcome] = []
        self._exams: dict[str, Any] = {}
        earlier = _earlier(folder / f"{BENCHMARKS}.json", console.note)
        self._before = {_key(outcome): outcome for outcome in earlier}
        self._unrecorded = False
        self._apart: set[str] = set()  # words whose models cannot share rows, which was said

    def measure(self, model: ComparedModel) -> None:
        for name, loaded in zip(model.names, model.models(), strict=True):
            loaded.must_continue_text("a benchmark")
            for selection in self._selections:
                self._outcomes.append(self._outcome(name, loaded, selection))
                self._write()
            if keeps_rows_apart(loaded.model) and model.word not in self._apart:
                self._apart.add(model.word)
                self._console.note(f"{model.word}: {APART}")

    def result(self) -> Result:
        notes = [
            f"{one.task.name}: {one.searched} of {one.available} items are excluded because a search used them"
            for one in self._selections
            if one.searched
        ]
        return Result(self._folder.path, tuple(self._outcomes), tuple(notes))

    def _outcome(self, name: str, loaded: LoadedModel, selection: Selection) -> Outcome:
        task, device = selection.task, str(loaded.model.device.type)
        identity = (name, loaded.digest, task.name, selection.digest, task.metric)
        blank = Outcome(*identity, {}, "nonfinite", 0.0, device, cache_key(**loaded.identity))
        key = _key(blank)
        known = self._known(key) or self._unchecked(blank)
        if known is None:
            waiting = partial(self._console.note, f"another process is measuring {task.name}; waiting for its result")
            with exclusive(_place(key).with_suffix(".lock"), waiting):
                known = self._known(key)
                if known is None:
                    known = self._ask(blank, loaded, selection)
                    write_whole(_place(key), json.dumps(known.to_dict()))
        return replace(known, model=name)

    def _known(self, key: str) -> Outcome | None:
        return self._before.get(key) or _cached(key, self._console.note)

    def _unchecked(self, blank: Outcome) -> Outcome | None:
        """An outcome of an earlier version, which did not record config and tokenizer; None if there is none."""
        known = self._known(_key(replace(blank, architecture="")))
        if known is not None and not self._unrecorded:
            self._unrecorded = True
            self._console.note(
                "some outcomes are of an earlier version, which recorded the weights only: whether config and "
                "tokenizer have changed since is not checked"
            )
        return known

    def _ask(self, blank: Outcome, loaded: LoadedModel, selection: Selection) -> Outcome:
        from search.benchmarking.generation import NonFinite
        from search.benchmarking.lm_eval_model import LanguageModel
        from search.benchmarking.lm_eval_tasks import Exam

        exam = self._exams.get(blank.task) or Exam(selection)
        self._exams[blank.task] = exam
        started = time.monotonic()
        with self._console.stage(f"{blank.model} {blank.task}", len(exam.requests), "requests") as stage:
            language = LanguageModel(loaded, stage.advance)
            try:
                figures, state = exam.grade(getattr(language, exam.kind)), "ok"
                stage.advance(0, f"{blank.metric} {mean_and_error(figures[blank.metric])[0]:.3f}")
            except NonFinite as error:
                figures, state = {}, "nonfinite"
                self._console.note(f"{blank.model}: {error}; it has no result on {blank.task}")
        return replace(blank, figures=figures, state=state, seconds=round(time.monotonic() - started, 3))

    def _write(self) -> None:
        """Write both files, including the earlier outcomes in the folder for other models and tasks."""
        result = self.result()
        fresh = {(outcome.model, outcome.task) for outcome in self._outcomes}
        kept = [one for one in self._before.values() if (one.model, one.task) not in fresh]
        document = {
            "request": asdict(self._request),
            "lm_eval": version("lm-eval"),
            "tasks": {one.task.name: _described(one) for one in self._selections},
            "differences": result.differences(),
            "notes": list(result.notes),
            "environment": environment(),
            "outcomes": [outcome.to_dict() for outcome in (*self._outcomes, *kept)],
        }
        self._folder.write_text(f"{BENCHMARKS}.json", json.dumps(finite(document), ensure_ascii=False) + "\n")
        rows = [outcome.row() for outcome in (*self._outcomes, *kept)]
        self._folder.write_text(f"{BENCHMARKS}.csv", csv_text(rows))


def _described(selection: Selection) -> dict[str, object]:
    """The stock name of a task, its data sources, and the digests of its items in the order of `Outcome.figures`."""
    task = selection.task
    return {
        "stock": task.stock,
        "data": {"packages": task.folder, "hub": asdict(task.hub)},
        "items_digest": selection.digest,
        "available": selection.available,
        "searched": selection.searched,
        "items": [document.digest[:16] for document in selection.documents],
    }


def _check(request: BenchmarkRequest) -> None:
    """Check the request before anything is read.

    Raises:
        ValueError: there is no model, there are too few samples, or the source is unknown.
    """
    if not request.models:
        raise Refusal("name at least one model: default, a run folder, a prior, a model folder or a hub id")
    if request.samples is not None and request.samples < 2:
        raise Refusal(f"samples must be at least 2, got {request.samples}")
    if request.source not in SOURCES:
        raise Refusal(
            f"source must be {', '.join(SOURCES)}, got {request.source!r}; the nearest is "
            f"{nearest(request.source, SOURCES)}"
        )


def _folder(request: BenchmarkRequest) -> Path:
    """The output folder.

    Raises:
        ValueError: the folder named is a file or holds files that are not from a run or benchmark.
    """
    if request.out is not None:
        path = Path(request.out).absolute()
        if path.exists() and not path.is_dir():
            raise Refusal(f"out must be a folder, got the file {path}")
        ours = (CONFIG, f"{BENCHMARKS}.json")
        if path.exists() and contents(path) and not any((path / name).is_file() for name in ours):
            raise Refusal(f"out must be a new or empty folder or the folder of a run or benchmark, but {path} is not")
        return path
    runs = [Path(word).absolute() for word in request.models if (Path(word) / CONFIG).is_file()]
    runs = [path for path in runs if (path / STUDY).is_file()]
    if len(runs) == 1 == len(request.models):
        return runs[0]
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(request.models[0]).name)[:60].strip("-.") or "model"
    return RESULTS.absolute() / f"{datetime.now():%Y%m%d-%H%M%S}-benchmark-{stem}"


def _key(outcome: Outcome) -> str:
    """The key under which an outcome is stored: a digest of everything that determines it; the model name does not."""
    parts = (
        "benchmark 1",
        version("lm-eval"),
        outcome.model_digest,
        outcome.task,
        outcome.items_digest,
        outcome.device,
        *([outcome.architecture] if outcome.architecture else []),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _place(key: str) -> Path:
    return cache_folder() / "benchmarks" / key[:2] / f"{key}.json"


def _cached(key: str, note: Callable[[str], None]) -> Outcome | None:
    """The cached outcome of a key; None if there is none, or if its file is damaged or belongs to another key."""
    place = _place(key)
    if not place.is_file():
        return None
    found = _outcome(_read(place))
    if found is None or _key(found) != key:
        note(f"cached outcome {place.name} is damaged; it is measured again")
        return None
    return found


def _earlier(path: Path, note: Callable[[str], None]) -> list[Outcome]:
    """The intact outcomes in a file; an empty list if it does not exist or cannot be read."""
    content = _read(path)
    stored = content.get("outcomes") if isinstance(content, Mapping) else None
    found = [_outcome(one) for one in stored] if isinstance(stored, list) else []
    intact = [outcome for outcome in found if outcome is not None]
    if damaged := len(found) - len(intact):
        note(f"{damaged} of {len(found)} outcomes in {path} are damaged; they are measured again")
    return intact


def _outcome(stored: object) -> Outcome | None:
    """The outcome that `Outcome.to_dict` stored; None if it is damaged."""
    try:
        return Outcome.from_dict(stored) if isinstance(stored, Mapping) else None
    except (TypeError, ValueError):
        return None


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None

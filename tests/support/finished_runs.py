"""Runs on a tiny model through the command line, and what identifies them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
from fake_data import jsonl
from optuna.storages import RDBStorage
from small_run import words

from search import cli


def trials(folder: Path) -> list[tuple[object, ...]]:
    """What identifies the trials of a run, wall time left out."""
    storage = RDBStorage(f"sqlite:///{folder / 'study.db'}", skip_compatibility_check=True)
    study = optuna.load_study(study_name=None, storage=storage)
    return [
        (
            trial.user_attrs["trial.number"],
            trial.user_attrs["schedule.digest"],
            trial.value,
            tuple(trial.params.items()),
        )
        for trial in study.trials
    ]


def run(folder: Path, **changes: object) -> dict[str, Any]:
    assert cli.main(words(out=folder, **changes)) == cli.DONE
    document = json.loads((folder / "summary.json").read_text())
    assert isinstance(document, dict)
    return document


def exam(path: Path, word: str) -> Path:
    """Questions that begin with `word`."""
    choices = ["one", "two", "three"]
    return jsonl(path, [{"question": f"{word} is {n}?", "choices": choices, "answer": n % 3} for n in range(40)])


def files(folder: Path) -> dict[str, bytes]:
    """Content of everything in a folder, by its place there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

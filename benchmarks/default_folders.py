"""Cuts the default model to smaller sizes, and writes it for engines with what transformers generates from it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

from benchmarks.tiny_folders import EXPECTED, answers
from compression import ScheduleApplier, lagrangian, to_schedule
from compression.schedule import Form
from search.config import Config
from search.experiment.experiment import Experiment
from search.export.folder import export_gguf, export_model, export_plain
from search.model.loading import LoadedModel

__all__ = ["KEPT", "PROMPTS", "cut_default", "default_folders"]

KEPT = 0.618
"""Kept fraction over the sites of the default model that leaves 94 million parameters."""

PROMPTS = (
    "The capital of France is",
    "Water boils at 100 degrees Celsius, and freezes at",
    "Question: What do plants need to grow?\nAnswer:",
    "In 1969, the first people",
    "def add(a, b):\n    return",
    "She opened the door and",
)


@contextlib.contextmanager
def cut_default(kept: float, form: Form, serve: str = "transformers") -> Iterator[LoadedModel]:
    """The default model cut by the closed form, without repair or healing.

    Args:
        kept: kept fraction over the sites.
        form, serve: as for `search.config.Config`.
    """
    experiment = Experiment.open(Config.of(dict(target_kept=kept, form=form, serve=serve, calibration_tokens=1024)))
    menu = experiment.menu()
    schedule = to_schedule(menu, lagrangian(menu, math.floor(kept * menu.dense_parameters)))
    with ScheduleApplier(experiment.loaded.model, experiment.store, packed=True) as applier:
        applier.apply_(schedule)
        yield experiment.loaded


def default_folders(folder: Path) -> None:
    """Write the default model at `KEPT` for every engine, and what transformers generates, as `write_tiny_folders`."""
    said = {}
    prompts: list[list[int]] = []
    for name, form, serve in (
        ("hf", "any", "transformers"),
        ("plain", "plain", "vllm"),
        ("gguf", "plain", "llama.cpp"),
    ):
        with cut_default(KEPT, form, serve) as loaded:
            prompts = [[*loaded.beginning, *loaded.encode(text)] for text in PROMPTS]
            said[name] = answers(loaded.model, prompts)
            if name == "hf":
                export_model(loaded.model, loaded.tokenizer, folder / name)
            elif name == "plain":
                export_plain(loaded.model, loaded.tokenizer, folder / name)
            else:
                export_gguf(loaded.model, loaded.tokenizer, folder / name, "float32")
    (folder / EXPECTED).write_text(json.dumps({"prompts": prompts, "answers": said}), encoding="utf-8")

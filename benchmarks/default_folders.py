"""Cuts the default model to smaller sizes, and writes it for engines with what transformers generates from it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.tiny_folders import EXPECTED, answers, cast_
from compression import ScheduleApplier, lagrangian, to_schedule
from compression.schedule import Form
from compression.sites import replaced
from search.config import Config
from search.engines import INTEGERS
from search.experiment.experiment import Experiment
from search.export.folder import export_gguf, export_integers, export_model, export_plain
from search.model.loading import LoadedModel

__all__ = ["KEPT", "PROMPTS", "SIZES", "cut_default", "default_folders"]

KEPT = 0.618
"""Kept fraction over the sites of the default model that leaves 94 million parameters."""
SIZES = {"mlx": "100MB", "compressed-tensors": "130MB"}
"""Sizes of the default model in folders of integers."""

PROMPTS = (
    "The capital of France is",
    "Water boils at 100 degrees Celsius, and freezes at",
    "Question: What do plants need to grow?\nAnswer:",
    "In 1969, the first people",
    "def add(a, b):\n    return",
    "She opened the door and",
)


@contextlib.contextmanager
def cut_default(
    target: float | str, form: Form, serve: str = "transformers", bits: str | None = None
) -> Iterator[LoadedModel]:
    """The default model in float32, cut by the closed form, without repair or healing.

    Args:
        target: kept fraction over the sites, or a size such as "100MB".
        form, serve: as for `search.config.Config`.
        bits: as its `matrix_bits`.
    """
    asked = {"size" if isinstance(target, str) else "target_kept": target, "matrix_bits": bits}
    how = {"form": form, "serve": serve, "calibration_tokens": 1024, "dtype": "float32"}
    experiment = Experiment.open(Config.of({**how, **asked}))
    menu, model = experiment.menu(), experiment.loaded.model
    budget = math.floor(experiment.budget.target_kept * menu.dense_parameters)
    schedule, ends = to_schedule(menu, lagrangian(menu, budget)), experiment.stored_ends()
    with ScheduleApplier(model, experiment.store, packed=True) as applier:
        applier.apply_(schedule)
        with replaced(model, ends):
            yield experiment.loaded


def default_folders(folder: Path, only: Collection[str] = ()) -> None:
    """Write the default model for every engine, and what transformers generates, as `write_tiny_folders`.

    It is at `KEPT`, and for folders of integers at `SIZES`; vLLM on a processor computes with 4 bits.
    """
    said = {}
    prompts: list[list[int]] = []
    ways: Sequence[tuple[str, Form, str, float | str, str | None]] = (
        ("hf", "any", "transformers", KEPT, None),
        ("plain", "plain", "vllm", KEPT, None),
        ("gguf", "plain", "llama.cpp", KEPT, None),
        ("mlx", "small", "mlx-lm", SIZES["mlx"], None),
        ("compressed-tensors", "small", "vllm", SIZES["compressed-tensors"], "4,16"),
    )
    for name, form, serve, target, bits in ways:
        if only and name not in only:
            continue
        with cut_default(target, form, serve, bits) as loaded:
            prompts = [[*loaded.beginning, *loaded.encode(text)] for text in PROMPTS]
            said[name] = answers(loaded.model, prompts)
            if name == "hf":
                export_model(loaded.model, loaded.tokenizer, folder / name)
            elif name == "plain":
                export_plain(loaded.model, loaded.tokenizer, folder / name)
            elif name in INTEGERS:
                cast_(loaded.model, torch.float16)
                export_integers(loaded.model, loaded.tokenizer, folder / name, name)
                cast_(loaded.model, torch.float32)
            else:
                export_gguf(loaded.model, loaded.tokenizer, folder / name, "float32")
    (folder / EXPECTED).write_text(json.dumps({"prompts": prompts, "answers": said}), encoding="utf-8")

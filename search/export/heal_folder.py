"""Heals an exported folder: trains its model towards the dense model it was made from, and exports the result.

A quantized model keeps its integers; what is trained are their scales, see `compression.training.scales`.

Knows folders that `search.py export` wrote; `search.healing.training` knows how healing works.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compression.layers.packed import PackedMatrix
from compression.refusal import Refusal
from compression.sites import model_parameters
from search.config import Config
from search.evaluation.quality import Quality
from search.evaluation.workload import Workload
from search.experiment.experiment import Experiment
from search.experiment.open_model import open_model
from search.export.folder import check_export, export_model, footprint, forms
from search.export.model_card import model_card
from search.export.quantize import rounded
from search.export.run import CHANGES
from search.healing.plan import HealingOptions, text_tokens
from search.healing.run import HealedRun, held, judge_of
from search.healing.teacher import output_head
from search.healing.text import heal_text
from search.healing.training import heal_
from search.model.devices import resolve_device
from search.model.kinds import kind_of_model
from search.model.loading import load_for_use
from search.model.own_code import refuse_own_code
from search.priors.format import Prior
from search.priors.same_model import refuse_other_model
from search.reporting.tables import Row
from search.runtime.console import Console
from search.runtime.distributed import Processes
from search.runtime.run_folder import PRIOR, refuse_held, refuse_unwritable, refuse_used
from search.runtime.tensorboard import curves

__all__ = ["heal_export"]

_QUANTIZED = (
    "{rounded} Then their scales, the norms and the biases were trained for a while to match the outputs of the "
    "original."
)


def heal_export(source: Path, dense: str, options: HealingOptions, console: Console) -> HealedRun:
    """Heal the model of an exported folder and export the result; continues an earlier attempt that was interrupted.

    Args:
        source: the exported folder; it does not change.
        dense: name of the dense model that `source` was made from, as `search.model.loading.load_model` takes it.

    Raises:
        ValueError: `source` is not an exported folder with a prior, or was made from another dense model; an option is
            out of range; or another process heals into the same folder.
        DataUnavailable: the model or the data cannot be obtained.
    """
    if not (source / PRIOR).is_file():
        raise Refusal(f"heal needs the {PRIOR} of an exported folder, and {source} has none")
    refuse_own_code(str(source), source)
    prior = Prior.read(source / PRIOR)
    config = Config.of({"model": dense, "dtype": prior.configuration.get("dtype", "auto")})
    device = resolve_device(config.device)
    plan = options.plan(config.seed, device)
    folder = Path(options.out or f"{source}-healed-{options.data_name}-{plan.length}").absolute()
    refuse_used(folder)
    unfinished, first = folder.with_name(f".{folder.name}-unfinished"), Processes.is_first()
    refuse_unwritable(unfinished)
    if first:
        refuse_held(unfinished)
    with console.stage("load"):
        loaded, sites = open_model(config, device)
        if prior.model.id != loaded.model_id:
            raise Refusal(
                f"{source} was made from {prior.model.id}, not {loaded.model_id}; pass the former with --model"
            )
        refuse_other_model(prior, loaded, source, console.note)
        given = load_for_use(str(source), device)
        dtype = given.model.dtype
        model = given.model.to(loaded.model.dtype)
    output_head(loaded.model)  # refuses a model that cannot be healed
    check_export("hf", loaded.model, loaded.tokenizer)
    with console.stage("data"):
        experiment = Experiment.of(config, loaded, sites, device, console.note)
        text = heal_text(loaded, options.data, options.row_tokens, plan.seed, text_tokens(plan, device, options))
        judge = judge_of(experiment, loaded.model)
        workload = Workload(experiment.shards("heldout")[0], loaded.model)
        rows = [_row("dense", workload.reference(loaded.model), loaded.model)]
    rows.append(_row("exported", workload.measure(model), model))
    with held(unfinished):
        with console.stage("heal", plan.tokens, "tokens") as stage, curves(unfinished if first else None) as drawn:
            healed = heal_(model, loaded.model, text, judge, plan, unfinished, stage, console.note, drawn)
        rows.append(_row("healed", workload.measure(model), model))
        if first:
            _write(model.to(dtype), given.tokenizer, folder, source / PRIOR, rows)
            shutil.rmtree(unfinished, ignore_errors=True)
    return HealedRun(rows, folder, healed.stopped)


def _write(model: Any, tokenizer: Any, folder: Path, prior: Path, rows: Sequence[Row]) -> None:
    document, size = Prior.read(prior).model_dump(mode="json"), f"Compressed: {footprint(model)}. {forms(model)}"
    loader = kind_of_model(model).value
    changes = [_QUANTIZED.format(rounded=sentence)] if (sentence := rounded(model)) else [CHANGES["healed"]]
    card = model_card(folder.name, "hf", document, {}, "healed", size, changes, rows, loader)
    export_model(model, tokenizer, folder, card, [prior])


def _row(name: str, quality: Quality, model: Any) -> dict[str, object]:
    packed = sum(len(each.codes) * each.columns for each in model.modules() if isinstance(each, PackedMatrix))
    size = {"parameters": model_parameters(model) + packed, "bytes": footprint(model).stored}
    return {"schedule": name, **quality.to_row(), **size}

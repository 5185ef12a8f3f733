"""Exports the result of a run as a folder that others can load, with a model card and the prior.

Knows run folders and how to restore their models; `search.export.folder` knows how a model is written.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compression.numerics.packed_size import FLOATING
from compression.refusal import Refusal
from compression.schedule import Choice
from search.config import BYTES, Config, read_fields
from search.engines import ENGINES, INTEGERS
from search.experiment.experiment import Experiment
from search.export.deci import check_deci
from search.export.folder import (
    GGUF,
    check_export,
    export_dense_,
    export_gguf,
    export_integers,
    export_model,
    export_plain,
    footprint,
    forms,
)
from search.export.forms import check_form
from search.export.gguf_file import GGUF_TYPES, read_values
from search.export.model_card import model_card
from search.export.plain import plain_model
from search.export.quantize import module_bits, quantize_experiment_, rounded
from search.export.restore import RestoredRun, restore
from search.model.kinds import kind_of_model
from search.priors.format import Prior
from search.runtime.console import Console
from search.runtime.run_folder import CONFIG, PRIOR

__all__ = ["CHANGES", "ExportForm", "export_run"]

CHANGES = {
    "healed": "After the search, its compressed matrices, norms and biases were trained for a while to match the "
    "outputs of the original.",
    "repaired": "After the search, each compressed matrix was solved again, block by block, so that its outputs match "
    "those of the original; nothing was trained.",
    "searched": "After the search, the model was neither repaired nor trained.",
}
"""What happened to the model after the search, by the state that is exported; a sentence of the model card."""

_AFTER = {
    "hf": "load it with: import search.hf; {loader}.from_pretrained({folder!r}), "
    "or anywhere with trust_remote_code=True",
    "dense": "dense: every tool loads it; it has the quality of the compressed model and the size of the original",
    "gguf-ready": "dense float16: it has the quality of the compressed model and the size of the original; "
    "next: python llama.cpp/convert_hf_to_gguf.py {folder}",
    "plain": "a smaller model for every tool that loads the original; if its blocks have different widths, it is "
    "DeciLM: vllm serve {folder} --trust-remote-code, and trust_remote_code=True in transformers",
    "gguf": "a GGUF file as small as the model; next: llama-server -m {folder}/{file}",
    "compressed-tensors": "matrices of integers; next: vllm serve {folder} --trust-remote-code, or in transformers, "
    "with the package compressed-tensors, {loader}.from_pretrained({folder!r}, trust_remote_code=True)",
    "mlx": "matrices of integers; next: mlx_lm.generate --model {folder} --trust-remote-code --prompt Hello",
}


@dataclass(frozen=True)
class ExportForm:
    """The form in which a model is exported.

    Attributes:
        kind: one of `search.export.forms.FORMATS`.
        dtype: name of a torch dtype; None means bfloat16, or float16 for "gguf-ready" and "gguf".
        quantize: "none"; "int8", "int4" or "mixed"; or for "gguf" a type of GGUF files, such as "q8_0".
        state: one of `search.export.restore.STATES`; None takes the furthest state that the run reached.
        device: device on which the model is restored.
        trusted: as for `search.export.restore.restore`.
    """

    kind: str = "hf"
    dtype: str | None = None
    quantize: str = "none"
    state: str | None = None
    device: str = "auto"
    trusted: bool = False


def export_run(
    source: Path,
    folder: Path,
    form: ExportForm,
    console: Console,
    healed: Path | None = None,
    opened: Experiment | None = None,
) -> str:
    """Write the compressed model of the run in `source` into `folder`.

    Args:
        healed: folder of a healing; None takes the run's own healing.
        opened: the experiment of the run with its dense model, if it is in memory already; it is compressed in place.

    Returns:
        Text for the user: the size of the model and how to load the folder.

    Raises:
        ValueError: as `search.export.restore.restore`, or the model cannot be exported in this form.
        DataUnavailable: as `search.export.restore.restore`.
    """
    check_form(form.kind, form.dtype, form.quantize)
    quantized = form.quantize != "none"

    def check(model: Any, tokenizer: Any) -> None:
        check_export(form.kind, model, tokenizer)
        _refuse_larger_numbers(form, source)
        if form.kind in ("plain", "gguf", *INTEGERS):
            _refuse_factors(form.kind, source)
        if form.kind == "plain" and _blocks_differ(source):
            check_deci(model)

    restored = restore(source, console, form.device, form.state, healed, quantized or None, opened, check, form.trusted)
    loaded, summary, state = restored.experiment.loaded, restored.summary, restored.state
    other, measured = healed if state == "healed" else None, []
    if not quantized and (other is not None or restored.measured is None):
        measured = [_row_of(restored, other)]
    if form.kind == "gguf":
        return _gguf(restored, folder, form, console, source, measured)
    loader = kind_of_model(loaded.model).value
    dtype = form.dtype or ("float16" if form.kind in ("gguf-ready", *INTEGERS) else "bfloat16")
    model = loaded.model.to(getattr(torch, dtype))
    changes = [CHANGES[state]]
    if quantized:
        measured = [_quantized(restored, form.quantize, console)]
    if sentence := rounded(model):
        changes.append(sentence)
    size = f"Compressed: {footprint(model)}. {forms(model)}"
    kind = "plain" if form.kind == "hf" and not quantized and _needs_no_code(model, source) else form.kind
    with console.stage("write"):
        card = model_card(folder.name, kind, restored.document, summary, state, size, changes, measured, loader)
        if kind == "hf":
            export_model(model, loaded.tokenizer, folder, card, [source / PRIOR])
        elif kind == "plain":
            export_plain(model, loaded.tokenizer, folder, card, [source / PRIOR])
        elif kind in INTEGERS:
            export_integers(model, loaded.tokenizer, folder, kind, card, [source / PRIOR])
        else:
            export_dense_(model, loaded.tokenizer, folder, card, [source / PRIOR])
    return f"{size}\n{_AFTER[kind].format(folder=str(folder), loader=loader)}"


def _needs_no_code(model: Any, run: Path) -> bool:
    """Whether a compressed model is an ordinary smaller one of the original's architecture."""
    if _not_plain(run) or _blocks_differ(run) or rounded(model):
        return False
    try:
        plain_model(model)
    except Refusal:
        return False
    return True


def _refuse_larger_numbers(form: ExportForm, run: Path) -> None:
    """Refuse numbers of other sizes than the run counted on, before any work.

    Raises:
        Refusal: a run by bytes is to be stored in float32, or a run with pruned or rounded matrices in integers.
    """
    config, small = Config.of_run(read_fields(run / CONFIG), trusted=True), form.kind in ("hf", "plain", "gguf")
    if config.by_bytes and small and form.dtype == "float32":
        raise Refusal(
            f"dtype must be bfloat16 or float16 for a run that counted {8 * BYTES} bits a number, got float32"
        )
    schedule = Prior.read(run / PRIOR).schedule
    chosen = [name for name, choice in schedule if choice.keeps_entries]
    if chosen and form.quantize in ("int8", "int4"):
        raise Refusal(
            f"quantize {form.quantize} stores all matrices as integers, and {len(chosen)} have entries or bits of "
            f"their own, such as {chosen[0]} ({_form(schedule[chosen[0]])}); use --quantize mixed"
        )


def _form(choice: Choice) -> str:
    return "factored" if choice.is_factored else "pruned" if choice.is_sparse else f"in {choice.bits} bits"


def _not_plain(run: Path) -> list[str]:
    """The matrices that the schedule of a run factors, prunes or rounds."""
    return [name for name, choice in Prior.read(run / PRIOR).schedule if not choice.is_plain]


def _refuse_factors(kind: str, run: Path) -> None:
    """Refuse a run with factors, pruned or rounded matrices or a rounded embedding, which other programs cannot hold.

    Raises:
        Refusal: names such a matrix and what to do.
    """
    config, schedule = Config.of_run(read_fields(run / CONFIG), trusted=True), Prior.read(run / PRIOR).schedule
    server, engine = next((name, each) for name, each in ENGINES.items() if kind in (each.plain, each.rounded))
    held = engine.bits if kind == engine.rounded else ()
    what, again = "factored, pruned or rounded matrices", "--form plain"
    if held:
        bits = ", ".join(map(str, held[1:-1]))
        what = f"factored or pruned matrices, and rounded ones only in {bits} or {held[-1]} bits"
        again = again if kind == engine.plain else f"--serve {server}"
    names = [
        name for name, choice in schedule if not (choice.is_plain or (not choice.is_sparse and choice.bits in held))
    ]
    if names:
        form = _form(schedule[names[0]])
        raise Refusal(
            f"the {kind} format holds no {what}: {len(names)} are other, such as {names[0]} ({form}); search with "
            f"{again}, or export with --format hf"
        )
    if config.rounds_embedding and not (held and min(engine.ends) < FLOATING):
        raise Refusal(
            f"the {kind} format holds no rounded embedding, as the result has; search with --embedding-bits "
            f"{8 * BYTES}, or export with --format hf"
        )


def _blocks_differ(run: Path) -> bool:
    """Whether the schedule of a run leaves different widths, or none, in the blocks of its model."""
    widths: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for name, choice in Prior.read(run / PRIOR).schedule:
        widths[".".join(name.split(".")[-2:])].add(choice.widths)
    return any(len(each) > 1 or each == {(0,)} for each in widths.values())


def _gguf(
    restored: RestoredRun,
    folder: Path,
    form: ExportForm,
    console: Console,
    source: Path,
    measured: list[dict[str, object]],
) -> str:
    """Write the GGUF file of a restored run; quantized weights are measured as the file holds them."""
    loaded, state = restored.experiment.loaded, restored.state
    kind = form.quantize if form.quantize != "none" else form.dtype or "float16"
    changes, said = [CHANGES[state]], []
    if form.quantize != "none":
        changes.append(f"The matrices are stored as {GGUF_TYPES[kind]}, rounded to the nearest value.")

    def card(file: Path) -> str:
        size = file.stat().st_size
        rows = list(measured)
        if form.quantize != "none":
            rows = [_measured_file(restored, file, kind, console)]
        said.append(f"Compressed: a file of {size / 1e6:,.1f} MB. {forms(loaded.model)}")
        return model_card(folder.name, form.kind, restored.document, restored.summary, state, said[0], changes, rows)

    with console.stage("write"):
        about = {"name": folder.name, "license_": loaded.license, "source": loaded.model_id}
        export_gguf(loaded.model, loaded.tokenizer, folder, kind, card, [source / PRIOR], **about)
    return f"{said[0]}\n{_AFTER[form.kind].format(folder=str(folder), file=GGUF)}"


@torch.no_grad()
def _measured_file(restored: RestoredRun, file: Path, kind: str, console: Console) -> dict[str, object]:
    """Put the weights of a GGUF file into the model, measure them on held-out text, and return the table's row."""
    model, workload = restored.experiment.loaded.model, restored.workload
    assert workload is not None
    for name, values in read_values(model, file).items():
        parameter = model.get_parameter(name)
        parameter.data = values.to(parameter)  # as in model.to(…); the reference keeps the values of the dense head
    quality = workload.measure(model)
    console.note(f"held-out KL after quantization: {quality.kl:.4f} nats a token")
    return {"schedule": f"{restored.state}, {kind}", **quality.to_row(), "bytes": file.stat().st_size}


def _row_of(restored: RestoredRun, healed: Path | None) -> dict[str, object]:
    """The table's row of weights that the run did not measure: that of their healing, or measured now."""
    name = restored.state if healed is None else f"{restored.state} ({healed.name})"
    if restored.measured is not None:
        return {**restored.measured, "schedule": name}
    assert restored.workload is not None
    model = restored.experiment.loaded.model
    return {"schedule": name, **restored.workload.measure(model).to_row(), "bytes": footprint(model).stored}


def _quantized(restored: RestoredRun, kind: str, console: Console) -> dict[str, object]:
    """Quantize the model in place, measure it on held-out text and report items, and return its row of the table."""
    experiment, workload = restored.experiment, restored.workload
    assert workload is not None
    bits = module_bits(experiment.loaded.model, experiment.sites, kind)
    with console.stage("quantize", len(bits), "modules") as stage:
        quantize_experiment_(experiment, bits, lambda done: stage.advance(1))
    with console.stage("measure"):
        quality = workload.measure(experiment.loaded.model)
    console.note(f"held-out KL after quantization: {quality.kl:.4f} nats a token")
    return {
        "schedule": f"{restored.state}, {kind}",
        **quality.to_row(),
        "bytes": footprint(experiment.loaded.model).stored,
    }

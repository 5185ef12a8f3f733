"""`search.py export`: the result of a run as a folder that others load."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.config import nearest
from search.console import Console
from search.failures import DONE, explain
from search.flags import Parser, parse

if TYPE_CHECKING:
    from search.restored import Outcome

__all__ = ["run"]

_ABOUT = """\
Write the compressed model of a finished run as a folder.

  hf          for transformers, small: after `import search.hf`, or with trust_remote_code=True and nothing of ours
  dense       merged matrices for every tool (vLLM, llama.cpp's converter, Ollama): the quality of the compressed model,
              but the size and the speed of the original
  gguf-ready  dense in float16, checked for what llama.cpp's converter wants"""

_FORMATS = ("hf", "dense", "gguf-ready")
_DTYPES = ("bfloat16", "float16", "float32")
_QUANTIZE = ("none", "int8", "int4", "mixed")


def run(words: list[str]) -> int:
    """Returns the exit code."""
    given = parse(_parser(), words)
    shown = Console(quiet=given["quiet"])
    try:
        for field, valid in (("format", _FORMATS), ("dtype", _DTYPES), ("quantize", _QUANTIZE)):
            if given[field] not in (None, *valid):
                raise ValueError(
                    f"{field} must be one of {', '.join(valid)}; the nearest is "
                    f"{nearest(given[field], valid)}, got {given[field]!r}"
                )
        folder = Path(given["out"] or Path(given["run"]) / given["format"])
        with shown:
            from search.runfolder import refuse_used

            refuse_used(folder)
            print(_export(Path(given["run"]), folder, given, shown))
    except BaseException as error:
        return explain(error, None)
    print(folder)
    return DONE


def _export(source: Path, folder: Path, given: dict[str, Any], shown: Console) -> str:
    import torch

    from search.card import model_card
    from search.exporting import check_gguf, export_dense_, export_model, footprint
    from search.restored import restore
    from search.runfolder import PRIOR

    form = given["format"]
    quantized = given["quantize"] != "none"
    healed = Path(given["healed"]) if given["healed"] else None
    outcome = restore(source, shown, given["device"], given["state"], healed, reference=quantized)
    loaded = outcome.subject.loaded
    dtype = given["dtype"] or ("float16" if form == "gguf-ready" else "bfloat16")
    model = loaded.model.to(getattr(torch, dtype))
    changes = [_CHANGES[outcome.state]]
    measured = []
    if quantized:
        measured = [_quantized(outcome, given["quantize"], shown)]
        changes.append(f"{_BITS[given['quantize']]}, by groups, rounded in the metric of calibration text.")
    size = f"Compressed: {footprint(model)}."
    with shown.stage("write"):
        card = model_card(folder.name, form, outcome.document, outcome.summary, outcome.state, size, changes, measured)
        if form == "hf":
            export_model(model, loaded.tokenizer, folder, card)
        else:
            if form == "gguf-ready":
                check_gguf(model, loaded.tokenizer)
            export_dense_(model, loaded.tokenizer, folder, card)
        shutil.copyfile(source / PRIOR, folder / PRIOR)
    return f"{size}\n{_AFTER[form].format(folder=str(folder))}"


def _quantized(outcome: Outcome, kind: str, shown: Console) -> dict[str, object]:
    """Quantize the model in place; returns its row for the table, measured on held-out text and report items."""
    from search.exporting import footprint
    from search.quantize import module_bits, quantize_subject_

    subject, workload = outcome.subject, outcome.workload
    assert workload is not None
    bits = module_bits(subject.loaded.model, subject.sites, kind)
    with shown.stage("quantize", len(bits), "modules") as stage:
        quantize_subject_(subject, bits, lambda done: stage.advance(1))
    with shown.stage("measure"):
        quality = workload.measure(subject.loaded.model)
    shown.note(f"held-out KL after quantization: {quality.kl:.4f} nats a token")
    figures = {name.replace("standard_error", "stderr"): value for name, value in quality.scalars().items()}
    return {"schedule": f"{outcome.state}, {kind}", **figures, "bytes": footprint(subject.loaded.model).stored}


_BITS = {
    "int8": "Everything is stored in 8 bits",
    "int4": "Everything is stored in 4 bits",
    "mixed": "Embeddings, head and dense matrices are stored in 4 bits",
}

_CHANGES = {
    "healed": "Each matrix was then solved anew, and cores and norms were trained for a while towards the original.",
    "repaired": "Each matrix was then solved anew for what the original has at its place; nothing was trained.",
    "searched": "Nothing was trained or repaired afterwards.",
}

_AFTER = {
    "hf": "load it with: import search.hf; AutoModelForCausalLM.from_pretrained({folder!r}), "
    "or anywhere with trust_remote_code=True",
    "dense": "dense: every tool takes it; it keeps the quality change, not the size",
    "gguf-ready": "dense float16: it keeps the quality change, not the size; "
    "next: python llama.cpp/convert_hf_to_gguf.py {folder}",
}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="search.py export",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="python search.py export RUN [FLAGS]",
    )
    parser.add_argument("run", metavar="RUN", help="Folder of a finished run.")
    parser.add_argument("--format", metavar="NAME", default="hf", help=f"One of {', '.join(_FORMATS)}. Default: hf.")
    parser.add_argument("--out", metavar="DIR", help="New or empty folder. Default: RUN/FORMAT.")
    parser.add_argument(
        "--dtype", metavar="NAME", help=f"One of {', '.join(_DTYPES)}. Default: bfloat16, for gguf-ready float16."
    )
    parser.add_argument(
        "--quantize",
        metavar="NAME",
        default="none",
        help=f"One of {', '.join(_QUANTIZE)}: integers for all matrices; mixed leaves tensorized ones as they are "
        "and stores the rest in 4 bits. The result is measured again. Default: none.",
    )
    parser.add_argument(
        "--state",
        metavar="NAME",
        help="healed, repaired, or searched: as decomposed. Default: the first of these that the run has.",
    )
    parser.add_argument(
        "--healed", metavar="DIR", help="Folder that search.py heal wrote. Default: that of the run itself."
    )
    parser.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:n. Default: auto.")
    parser.add_argument("--quiet", action="store_true", help="No progress; only the result and errors.")
    return parser

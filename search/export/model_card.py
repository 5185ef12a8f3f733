"""The model card of an exported folder: what it is, how it is loaded, what it costs in quality, whose licence it has.

Takes plain values and writes Markdown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from search.reporting.tables import SUMMARY_COLUMNS, Row, markdown_table

__all__ = ["model_card"]

_COLUMNS = tuple(column for column in SUMMARY_COLUMNS if column.key != "kept_fraction")

_LOAD = {
    "hf": """\
```python
import search.hf                      # with Chisel installed; without it, pass trust_remote_code=True below
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Without either, loading is an error: the matrices that transformers would look for are not there. Names, shapes and
checksums of all tensors are verified while loading.""",
    "dense": """\
Its matrices are merged: every tool that takes the original takes this folder. **It keeps the change in quality, but it
is as large as the original and as fast.** The small one is the `hf` export.""",
}


def model_card(
    name: str,
    form: str,
    prior: Mapping[str, object],
    summary: Mapping[str, object],
    row: str,
    size: str,
    changes: Sequence[str],
    measured: Sequence[Row] = (),
) -> str:
    """The text of README.md.

    Args:
        form: one of `search.export.folder.FORMATS`.
        prior, summary: the content of the run's files.
        row: which row of the run's table this model is.
        size: one line on its bytes.
        changes: what was done to it, a sentence each.
        measured: rows of this very model where it is none of the run's table, as after quantization.
    """
    model, environment, data = (_part(prior, key) for key in ("model", "environment", "data"))
    rows = summary.get("rows")
    table = [each for each in rows if isinstance(each, Mapping)] if isinstance(rows, list) else []
    licence = str(model.get("license", "unknown"))
    digests = "".join(f"* {kind}: `{str(digest)[:16]}`\n" for kind, digest in data.items() if isinstance(digest, str))
    mine = "the rows below it" if measured else f"row `{row}`"
    return f"""\
---
license: {licence.lower()}
base_model: {model.get("id")}
library_name: transformers
pipeline_tag: text-generation
tags:
- chisel
- tensor-network
- compression
---

# {name}

{model.get("id")} with its weight matrices replaced by matrix product operators, whose bond dimensions were searched.
{" ".join(changes)}

{_LOAD["hf" if form == "hf" else "dense"].format(name=name)}

## Size

{size}

## Quality

The run that made it measured on held-out text and benchmark questions that it had not seen; this model is {mine}.

{markdown_table([*table, *measured], _COLUMNS)}
KL is the mean per token to the original model. Accuracy on few items is noise and is shown with its standard error.

## How it was made

The schedule is `prior.json`: kept fraction {_number(prior.get("kept_fraction"))} over the compressible matrices,
schedule `{str(prior.get("schedule_digest"))[:16]}`. Data, by sha256:

{digests}
Made by `{environment.get("command")}` at commit `{str(environment.get("commit"))[:12]}`, {environment.get("date")}, on
{environment.get("cpu")}.

## Licence

The original's: {licence}. Weights derived from it stay under it.
"""


def _part(document: Mapping[str, object], key: str) -> Mapping[str, object]:
    part = document.get(key)
    return part if isinstance(part, Mapping) else {}


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "unknown"

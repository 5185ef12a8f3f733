"""Writes the model card of an exported folder: how to load the model, its size and quality, its provenance and licence.

Takes plain values and returns Markdown.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence

from search.reporting.tables import SUMMARY_COLUMNS, Row, markdown_table
from search.runtime.outside_text import front_matter, markdown_code, markdown_text, plain

__all__ = ["model_card"]

_COLUMNS = tuple(column for column in SUMMARY_COLUMNS if column.key != "kept_fraction")

_LOAD = {
    "hf": """\
```python
import search.hf                      # if Chisel is installed; otherwise pass trust_remote_code=True below
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained({quoted})
tokenizer = AutoTokenizer.from_pretrained({quoted})
```

transformers 5.16 or newer is needed. Without Chisel and without trust, loading raises an error, because the folder does
not contain the dense matrices that transformers looks for. The names, shapes and checksums of all tensors are verified
during loading.
{served}
llama.cpp and Ollama have no factored matrices, and do not load this folder.""",
    "dense": """\
The compressed matrices are multiplied out into dense ones, and removed hidden units and heads are filled up with zeros,
so every tool that loads the original loads this folder.
**It has the quality of the compressed model, but it is as large as the original and no faster.** The `hf` export is the
small one.""",
    "plain": """\
```python
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained({quoted})    # with trust_remote_code=True if modeling_deci.py is beside it
tokenizer = AutoTokenizer.from_pretrained({quoted})
```

```sh
vllm serve {shell}    # with --trust-remote-code if modeling_deci.py is beside it
mlx_lm.generate --model {shell} --prompt Hello    # the same
```

If all blocks have the same widths, the folder is an ordinary one of the original's architecture with smaller matrices,
and every tool that loads the original loads it. Otherwise it is a model of the architecture DeciLM, as Nemotron-NAS
models are: vLLM has it built in and takes only the settings from `configuration_deci.py`; transformers and mlx-lm take
the model from `modeling_deci.py` and `modeling_mlx.py`. This was tried with vLLM 0.32, with mlx-lm 0.32 on a processor,
and with transformers 5.16 and newer, not with SGLang and TensorRT-LLM. llama.cpp needs a file of `--format gguf`.""",
    "compressed-tensors": """\
```sh
vllm serve {shell}    # with --trust-remote-code if modeling_deci.py is beside it
```

```python
from transformers import {loader}, AutoTokenizer    # needs the package compressed-tensors

model = {loader}.from_pretrained({quoted})    # with trust_remote_code=True if modeling_deci.py is beside it
tokenizer = AutoTokenizer.from_pretrained({quoted})
```

Rounded matrices are stored in the format `pack-quantized` of the package compressed-tensors, with the integers and
scales of the search. vLLM computes with them: with 4 and 8 bits on a GPU, with 4 bits on a processor. transformers
unpacks them when it loads the folder, to 16 bits.""",
    "mlx": """\
```sh
mlx_lm.generate --model {shell} --prompt Hello    # with --trust-remote-code if modeling_mlx.py is beside it
```

Rounded matrices are stored as MLX has them, with the integers and scales of the search, and stay so in memory. Other
programs do not load this folder.""",
    "gguf": """\
```sh
llama-server -m model.gguf        # or llama-cli; for Ollama (not tried) a Modelfile with the line FROM ./model.gguf
```

The file `model.gguf` holds the weights, the tokenizer and the chat template. Where blocks have different widths, its
architecture is llama.cpp's `deci`. It was read back after writing, and every tensor compared.""",
}

_SERVED = """
```sh
vllm serve {shell}    # with vLLM 0.32, if Chisel is installed beside it; otherwise with --trust-remote-code
```

vLLM holds the model at this size too. It does not split factored layers over GPUs (`--tensor-parallel-size`), and
refuses a folder written with `--quantize`.
"""

_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
}
"""What the hub calls the use of a model, by the class that loads it."""


def model_card(
    name: str,
    form: str,
    prior: Mapping[str, object],
    summary: Mapping[str, object],
    row: str,
    size: str,
    changes: Sequence[str],
    measured: Sequence[Row] = (),
    loader: str = "AutoModelForCausalLM",
) -> str:
    """Return the text of README.md.

    Args:
        name: the folder's name, which is the card's title and the path in the loading example.
        form: one of `search.export.folder.FORMATS`.
        prior, summary: contents of the run's prior.json and summary.json.
        row: name of the row of the run's table that describes this model.
        size: one line that gives the size of the model in bytes.
        changes: one sentence for each step that followed the search.
        measured: rows measured on this exact model, needed where the run's table has none for it, as after
            quantization.
        loader: the class of transformers that loads the model.
    """
    model, environment, data = (_part(prior, key) for key in ("model", "environment", "data"))
    rows = summary.get("rows")
    table = [each for each in rows if isinstance(each, Mapping)] if isinstance(rows, list) else []
    licence = str(model.get("license", "unknown"))
    digests = "".join(
        f"* {markdown_text(kind)}: {markdown_code(str(digest)[:16])}\n"
        for kind, digest in data.items()
        if isinstance(digest, str)
    )
    mine = "the last row" if measured else f"row {markdown_code(row)}"
    head = front_matter(
        {
            "license": licence.lower(),
            "base_model": model.get("id"),
            "library_name": form if form in ("gguf", "mlx") else "transformers",
            "pipeline_tag": _PIPELINES[loader],
            "tags": ["chisel", "tensor-network", "compression"],
        }
    )
    loading = _LOAD.get(form, _LOAD["dense"])
    loading = loading.replace("{served}", _SERVED if loader == "AutoModelForCausalLM" else "")
    loading = loading.replace("{quoted}", json.dumps(plain(name), ensure_ascii=False))
    loading = loading.replace("{shell}", shlex.quote(plain(name))).replace("{loader}", loader)
    return f"""\
{head}
# {markdown_text(name)}

This is {markdown_text(model.get("id"))} with smaller weight matrices in its attention and MLP layers. A search chose
which of them became matrix product operators (MPOs), with which bond dimensions, and how many hidden units of the MLPs
and heads of the attention are left. {" ".join(changes)}

{loading}

## Size

{size}

## Quality

All models were measured on held-out text and benchmark questions that were not used for calibration or search. This
model is {mine} of the table.

{markdown_table([*table, *measured], _COLUMNS)}
KL is the mean KL divergence per token from the original model. Accuracy is shown with its standard error (±); on few
items it is too noisy to compare models.

## How it was made

The file `prior.json` holds the form of every matrix. The compressible matrices keep a fraction of
{_number(prior.get("kept_fraction"))} of their parameters (schedule {_digest(prior.get("schedule_digest"))}).

sha256 of the data:

{digests}
Made by {markdown_code(environment.get("command"))} at commit {markdown_code(str(environment.get("commit"))[:12])},
{markdown_text(environment.get("date"))}, on {markdown_text(environment.get("cpu"))}.

## Licence

The licence is that of the original model: {markdown_text(licence)}. It also covers weights derived from that model.
"""


def _part(document: Mapping[str, object], key: str) -> Mapping[str, object]:
    part = document.get(key)
    return part if isinstance(part, Mapping) else {}


def _digest(value: object) -> str:
    return markdown_code(str(value)[:16])


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "unknown"

"""Loads an exported folder once, as whoever receives it does, and compares its logits with those of the model.

Knows a model in memory and the folder it was written to; does not know how a folder is written.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compression.bonds import tolerance
from compression.refusal import Refusal
from search.model.kinds import kind_of_model
from search.model.loading import load_model
from search.model.own_code import MODULE, is_compressed, read_config, references
from search.model.pretrained import quiet_transformers
from search.model.spreading import is_spread

__all__ = ["is_own_architecture", "refuse_unlike", "rounded_once_more"]

_TOKENS = 32  # length of the text that is compared
_NOISE, _LARGEST = 2.0, 0.15
"""In 16 bits, logits may differ by so many times what rounding once more does, and by so much of their spread."""


def is_own_architecture(model: Any) -> bool:
    """Whether the code of a model comes with it, rather than with transformers."""
    return not type(model).__module__.startswith("transformers.models.")


@torch.no_grad()
def refuse_unlike(model: Any, written: Path, folder: Path, stored: Any = None) -> None:
    """Refuse a folder that does not load, or is not the model that was written.

    Its logits must equal those of the model but for rounding, and in a dense folder every tensor must be the same.

    Args:
        model: the model that was written.
        written: where the folder is now; of a compressed one, the code that was written beside the weights is used.
        folder: the name that it will have, for the message.
        stored: the model that holds the tensors of a dense folder, if that is not `model`.

    Raises:
        Refusal: says how the folder differs, or why it does not load.
    """
    device = torch.device("cpu") if is_spread(model) else model.device
    found = _compressed(model, written) if is_compressed(written) else _dense(stored or model, written, folder)
    ids = torch.arange(_TOKENS)[None] % model.config.get_text_config().vocab_size
    expected, logits = (
        each(input_ids=ids.to(each.device), use_cache=False).logits[0].float().to(device)
        for each in (model, found.to(device).eval())
    )
    if not torch.isfinite(expected).all():
        raise Refusal(
            f"{folder} is not written, because the model gives NaN or infinite logits in "
            f"{str(model.dtype).removeprefix('torch.')}; use --dtype float32"
        )
    difference, spread = _apart(logits, expected), float(expected.std())
    allowed = tolerance(model.dtype) * spread
    if difference > allowed and model.dtype != torch.float32:
        again = rounded_once_more(model, ids.to(model.device)).to(device)
        allowed = max(allowed, min(_NOISE * _apart(again, expected), _LARGEST * spread))
    if not difference <= allowed:
        raise Refusal(
            f"{folder} is not written, because the model that is loaded from it gives other logits (they differ by "
            f"{difference:.2g}); transformers does not store all that this architecture computes with: use another "
            "--format"
        )


@torch.no_grad()
def rounded_once_more(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Returns the logits (tokens, vocabulary), float32, of a model whose layers all round what they give at random.

    How far they are from those of the model says what the rounding of other orders of computation may do. It grows with
    the depth: in bfloat16 it is 0.04 of the spread of the logits of a model of 1.5 billion parameters.

    Args:
        ids: one text (1, tokens).
    """
    generator = torch.Generator(ids.device).manual_seed(0)
    unit = torch.finfo(model.dtype).eps

    def rounded(module: nn.Module, arguments: object, output: object) -> object:
        if not isinstance(output, torch.Tensor) or output.dtype != model.dtype:
            return output
        noise = torch.rand(output.shape, generator=generator, device=ids.device).to(output.device)
        return (output * (1 + unit * (noise - 0.5))).to(output.dtype)

    layers = [module for module in model.modules() if not any(True for _ in module.children())]
    hooks = [layer.register_forward_hook(rounded) for layer in layers]
    try:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        for hook in hooks:
            hook.remove()
    return logits


def _apart(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """How far the logits of most tokens are apart: the median, because rounding may send a few to other experts."""
    return float((logits - expected).abs().mean(-1).median())


def _dense(model: Any, written: Path, folder: Path) -> Any:
    found = load_model(str(written), "cpu", model.dtype, trusted=is_own_architecture(model)).model
    tensors = found.state_dict()
    for name, values in model.state_dict().items():
        if name not in tensors or not tensors[name].equal(values.cpu()):
            raise Refusal(f"{folder} was written wrongly: {name} differs; the disk may be faulty, so write it again")
    return found


def _compressed(model: Any, written: Path) -> Any:
    """The model as `trust_remote_code=True` loads it: by the file that was just written beside the weights."""
    name, file = f"{MODULE}_as_written", written / f"{MODULE}.py"
    spec = importlib.util.spec_from_file_location(name, file, loader=_Unkept(name, str(file)))
    assert spec is not None
    assert spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = code  # while its classes are defined and used
    try:
        spec.loader.exec_module(code)
        attention = model.config._attn_implementation
        with quiet_transformers():
            return getattr(code, _named(model, written)).from_pretrained(
                written,
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=False,
                dtype=model.dtype,
            )
    finally:
        del sys.modules[spec.name]


class _Unkept(importlib.machinery.SourceFileLoader):
    """Leaves no compiled file beside the code that it loads."""

    def set_data(self, path: str, data: object, *, _mode: int = 0) -> None:
        """Called with what would be written."""


def _named(model: Any, written: Path) -> str:
    """The name of the class that the config beside the code names for models of this kind."""
    stated = dict(references(read_config(written, "config.json")["auto_map"]))
    return stated[kind_of_model(model).value].partition(".")[2]

"""Names the forms in which a model is exported and how each can be quantized; imports no library."""

from __future__ import annotations

from compression.refusal import Refusal, nearest
from search.engines import INTEGERS

__all__ = ["DTYPES", "FORMATS", "GGUF", "QUANTIZE", "check_form"]

FORMATS = ("hf", "dense", "gguf-ready", "plain", "gguf", *INTEGERS)
GGUF = "model.gguf"
"""Name of the file in a folder of the format gguf."""
DTYPES = ("bfloat16", "float16", "float32")
_INTEGERS = ("int8", "int4", "mixed")
_GGUF = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
QUANTIZE = ("none", *_INTEGERS, *_GGUF)


def check_form(kind: str, dtype: str | None, quantize: str) -> None:
    """Refuse an unknown form, or a quantization that a form does not have.

    Raises:
        Refusal: names the value, those that are possible and the nearest of them.
    """
    for field, given, valid in (("format", kind, FORMATS), ("dtype", dtype, DTYPES), ("quantize", quantize, QUANTIZE)):
        if given is not None and given not in valid:
            raise Refusal(
                f"{field} must be one of {', '.join(valid)}, got {given!r}; the nearest is {nearest(given, valid)}"
            )
    if quantize in _GGUF and kind != "gguf":
        raise Refusal(f"quantize {quantize} is a type of GGUF files; use it with --format gguf")
    if kind in INTEGERS and (quantize != "none" or dtype not in (None, "float16")):
        raise Refusal(
            f"the {kind} format holds the integers of a search with form small and their scales in float16; use it "
            "without --quantize and --dtype"
        )
    if quantize in _INTEGERS and kind in ("gguf", "plain"):
        other = "one of " + ", ".join(_GGUF) if kind == "gguf" else "none, or --format hf"
        raise Refusal(f"the {kind} format cannot be quantized to {quantize}; use --quantize {other}")
    if quantize in _GGUF and dtype is not None:
        raise Refusal(f"quantize {quantize} and dtype {dtype} both give the type of the weights; use one of them")

"""Strict JSON: files from strangers, read whole or refused in one line. Knows no field of any of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

from compression.refusal import Refusal

__all__ = ["parse", "read_object"]


def parse(text: str) -> object:
    """The value in a JSON text.

    Raises:
        Refusal: one line: not JSON, nested too deeply, a key twice, or a number that is not finite.
    """
    try:
        value: object = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise Refusal("nested too deeply") from None
    except ValueError as error:
        raise Refusal(str(error)) from None
    return value


def read_object(path: Path, what: str, largest: int) -> dict[str, object]:
    """The object in a JSON file.

    Args:
        what: names the kind of file in messages: "the configuration".
        largest: bytes that the file may have; no more are read.

    Raises:
        Refusal: one line: not a readable file, larger, not UTF-8, no JSON object, or as `parse`.
    """
    try:
        if path.exists() and not path.is_file():
            raise Refusal("not a file")
        with path.open("rb") as file:
            content = file.read(largest + 1)
        if len(content) > largest:
            raise Refusal(f"larger than {largest} bytes")
        values = parse(content.decode("utf-8"))
    except OSError as error:
        raise Refusal(f"cannot read {what} {path}: {error.strerror}") from None
    except ValueError as error:
        raise Refusal(f"cannot use {what} {path}: {error}") from None
    if not isinstance(values, dict):
        raise Refusal(f"cannot use {what} {path}: a JSON object is wanted, got {type(values).__name__}")
    return values


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values: dict[str, object] = {}
    for key, value in pairs:
        if key in values:
            raise Refusal(f"the key {key!r} occurs twice")
        values[key] = value
    return values


def _refuse(constant: str) -> object:
    raise Refusal(f"{constant} is not allowed")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Refusal(f"{text} is not allowed, it is too large for a number")
    return value

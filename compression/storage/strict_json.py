"""Reads untrusted JSON files strictly: either the whole file is valid, or one line says why not.

Knows JSON and digests of JSON values; does not know the fields of any file.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path

from compression.refusal import Refusal
from compression.storage.whole_files import read_file

__all__ = ["json_digest", "parse", "read_object"]

_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escaped half of a surrogate pair; a whole pair has two of them
_DIGITS = 300  # of a whole number: one that is longer cannot become a float


def parse(text: str) -> object:
    """Returns the value in a JSON text.

    Raises:
        Refusal: the text is not JSON, is nested too deeply, repeats a key, or has a number that is not finite, a
            whole number of more than 300 digits, or half of a surrogate pair in a text. The message is one line.
    """
    try:
        value: object = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite, parse_int=_whole
        )
        if _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise Refusal("nested too deeply") from None
    except UnicodeEncodeError:
        raise Refusal("a text holds half of a surrogate pair, which is no character") from None
    except ValueError as error:
        raise Refusal(str(error)) from None
    return value


def read_object(path: Path, what: str, largest: int) -> dict[str, object]:
    """Returns the object in a JSON file.

    Args:
        path: the file.
        what: the kind of file, for messages, such as "the configuration".
        largest: largest allowed size of the file in bytes.

    Raises:
        Refusal: the file is not readable, too large, not UTF-8 or not a JSON object, or `parse` rejects it. The message
            is one line.
    """
    try:
        values = parse(read_file(path, largest).decode("utf-8-sig"))
    except OSError as error:
        raise Refusal(f"cannot read {what} {path}: {error.strerror}") from None
    except ValueError as error:
        raise Refusal(f"cannot use {what} {path}: {error}") from None
    if not isinstance(values, dict):
        raise Refusal(f"cannot use {what} {path}: expected a JSON object, got {type(values).__name__}")
    return values


def json_digest(value: object) -> str:
    """Returns the SHA-256 of a value's canonical JSON (sorted keys, no spaces), 64 hexadecimal digits.

    The value must be one that JSON returns unchanged, so that the digest of what is read equals that of what was
    written.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise Refusal(f"{text:.24}... is not allowed, it is too large for a whole number")
    return int(text)

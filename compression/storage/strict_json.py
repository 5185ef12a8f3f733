"""Reads untrusted JSON files strictly: either the whole file is valid, or one line says why not.

A file that would take long or much memory is refused before it is parsed: 12 MiB and 800,000 marks of JSON, the limits
of most files, take less than 100 MB and a second. Knows JSON and digests of JSON values; does not know the fields of
any file.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

from compression.refusal import Refusal
from compression.storage.whole_files import read_file

__all__ = ["LARGEST", "bounded_text", "json_digest", "parse", "read_object", "refuse_large", "shown"]

LARGEST = 12 << 20
"""Bytes of the largest JSON file that most readers accept."""
_MOST = 800_000
_WEIGHTS = {",": 1, "[": 1, "{": 1, ":": 2}
"""Marks that a value, or twice a key, needs: their number bounds the memory that parsing takes."""

_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escaped half of a surrogate pair; a whole pair has two of them
_DIGITS = 300  # of a whole number: one that is longer cannot become a float


def parse(text: str, keys: int | None = None) -> object:
    """Returns the value in a JSON text.

    Args:
        keys: most keys of one object; None sets no limit.

    Raises:
        Refusal: the text is not JSON, is nested too deeply, repeats a key, has an object with more keys, or has a
            number that is not finite, a whole number of more than 300 digits, or half of a surrogate pair in a text.
            The message is one line.
    """
    try:
        value: object = _decoder(keys).decode(text)
        if _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise Refusal("nested too deeply") from None
    except UnicodeEncodeError:
        raise Refusal("a text holds half of a surrogate pair, which is no character") from None
    except ValueError as error:
        raise Refusal(str(error)) from None
    return value


def read_object(path: Path, what: str, largest: int = LARGEST, keys: int | None = None) -> dict[str, object]:
    """Returns the object in a JSON file.

    Args:
        path: the file.
        what: the kind of file, for messages, such as "the configuration".
        largest: largest allowed size of the file in bytes.
        keys: as for `parse`.

    Raises:
        Refusal: `bounded_text` or `parse` rejects the file, or it is not a JSON object. The message is one line.
    """
    text = bounded_text(path, what, largest)
    try:
        values = parse(text, keys)
    except Refusal as error:
        raise Refusal(f"cannot use {what} {path}: {error}") from None
    if not isinstance(values, dict):
        raise Refusal(f"cannot use {what} {path}: expected a JSON object, got {type(values).__name__}")
    return values


def bounded_text(path: Path, what: str, largest: int = LARGEST) -> str:
    """Returns the text of a JSON file that is small enough to be parsed.

    Args:
        path, what, largest: as for `read_object`.

    Raises:
        Refusal: the file is not readable, too large, holds too many values, or is not UTF-8. The message is one line.
    """
    try:
        text = read_file(path, largest).decode("utf-8-sig")
        refuse_large(text, largest)
    except OSError as error:
        raise Refusal(f"cannot read {what} {path}: {error.strerror}") from None
    except ValueError as error:
        raise Refusal(f"cannot use {what} {path}: {error}") from None
    return text


def refuse_large(text: str, largest: int = LARGEST) -> None:
    """Refuse a JSON text that takes long or much memory to parse.

    Raises:
        Refusal: the text has more than `largest` characters or holds too many values.
    """
    if len(text) > largest:
        raise Refusal(f"larger than {largest} bytes")
    if sum(weight * text.count(mark) for mark, weight in _WEIGHTS.items()) > _MOST:
        raise Refusal("it holds too many values")


def shown(value: object, most: int = 80) -> str:
    """Returns a value from a file for a message: its repr, cut to `most` characters; of a container only the size."""
    if isinstance(value, dict | list | tuple) and len(value) > most:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} values"
    text = repr(value[: most + 1] if isinstance(value, str) else value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


@lru_cache
def _decoder(keys: int | None) -> json.JSONDecoder:
    def checked(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if keys is not None and len(pairs) > keys:
            raise Refusal(f"an object has {len(pairs)} keys, such as {shown(pairs[0][0])}, and at most {keys} are read")
        return _unique(pairs)

    return json.JSONDecoder(object_pairs_hook=checked, parse_constant=_refuse, parse_float=_finite, parse_int=_whole)


def json_digest(value: object) -> str:
    """Returns the SHA-256 of a value's canonical JSON (sorted keys, no spaces), 64 hexadecimal digits.

    The value must be one that JSON returns unchanged, so that the digest of what is read equals that of what was
    written.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise Refusal(f"the key {shown(key)} occurs twice")
    return values


def _refuse(constant: str) -> object:
    raise Refusal(f"{constant} is not allowed")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Refusal(f"{text:.80} is not allowed, it is too large for a number")
    return value


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise Refusal(f"{text:.24}... is not allowed, it is too large for a whole number")
    return int(text)

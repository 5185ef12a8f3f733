"""Reads items from a user's JSONL file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compression.refusal import Refusal, nearest
from compression.storage.strict_json import parse, shown
from compression.storage.whole_files import read_lines
from search.data.items import Item

__all__ = ["load_jsonl"]

_MAX_LINE = 1 << 20
_LARGEST_FILE = 32 << 20  # bytes
_MOST = 100_000  # questions; a run uses a few hundred of them
_TYPES: Mapping[str, type] = {"question": str, "choices": list, "answer": int, "subject": str}
_NEEDED = ("question", "choices", "answer")


def load_jsonl(path: Path) -> tuple[Item, ...]:
    """Read items from a file with one JSON object per line: question, choices, answer (an index), optionally subject.

    Raises:
        ValueError: the file is unreadable or empty, or a line, whose number is given, violates the schema.
    """
    items: list[Item] = []
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise Refusal(f"{path}: larger than {_LARGEST_FILE} bytes; a sample of its questions is enough")
        for number, line in read_lines(path, _MAX_LINE):
            if line.strip():
                if len(items) == _MOST:
                    raise Refusal(f"{path}: holds more than {_MOST} questions; a sample of them is enough")
                items.append(_item_of_line(line, f"{path}, line {number}"))
    except OSError as error:
        raise Refusal(f"proxy file {str(path)!r} cannot be read: {error.strerror}") from error
    if not items:
        raise Refusal(f"{path}: holds no item")
    return tuple(items)


def _item_of_line(line: str, where: str) -> Item:
    try:
        record = parse(line)
    except Refusal as error:
        raise Refusal(f"{where}: must be a JSON object without duplicate keys ({error})") from error
    if not isinstance(record, dict):
        raise Refusal(f"{where}: must be a JSON object, got {line.strip()!r:.60}")
    if missing := [key for key in _NEEDED if key not in record]:
        raise Refusal(f"{where}: {missing[0]!r} is missing")
    for key, value in record.items():
        if key not in _TYPES:
            raise Refusal(f"{where}: unknown key {shown(key)}; the nearest is {nearest(key[:100], _TYPES)!r}")
        if type(value) is not _TYPES[key] or (isinstance(value, list) and {type(text) for text in value} - {str}):
            expected = "a list of text" if key == "choices" else _TYPES[key].__name__
            raise Refusal(f"{where}: {key!r} must be {expected}, got {shown(value, 60)}")
    try:
        return Item(record["question"], tuple(record["choices"]), record["answer"], record.get("subject", ""))
    except ValueError as error:
        raise Refusal(f"{where}: {error}") from error

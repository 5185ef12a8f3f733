"""Reads items from a user's JSONL file."""

from __future__ import annotations

from pathlib import Path

from compression.refusal import Refusal, nearest
from compression.storage.strict_json import parse
from compression.storage.whole_files import read_lines
from search.data.items import Item

__all__ = ["load_jsonl"]

_MAX_LINE = 1 << 20


def load_jsonl(path: Path) -> tuple[Item, ...]:
    """Read items from a file with one JSON object per line: question, choices, answer (an index), optionally subject.

    Raises:
        ValueError: the file is unreadable or empty, or a line, whose number is given, violates the schema.
    """
    items = []
    try:
        for number, line in read_lines(path, _MAX_LINE):
            if line.strip():
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
    types: dict[str, type] = {"question": str, "choices": list, "answer": int, "subject": str}
    for key in types.keys() - record.keys() - {"subject"}:
        raise Refusal(f"{where}: {key!r} is missing")
    for key, value in record.items():
        if key not in types:
            raise Refusal(f"{where}: unknown key {key!r}; the nearest is {nearest(key, types)!r}")
        if type(value) is not types[key] or (isinstance(value, list) and {type(text) for text in value} - {str}):
            expected = "a list of text" if key == "choices" else types[key].__name__
            raise Refusal(f"{where}: {key!r} must be {expected}, got {value!r:.60}")
    try:
        return Item(record["question"], tuple(record["choices"]), record["answer"], record.get("subject", ""))
    except ValueError as error:
        raise Refusal(f"{where}: {error}") from error

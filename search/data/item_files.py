"""Reads items from a user's JSONL file: questions with choices, or texts with labels."""

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
_LABELLED = ("text", "label")


def load_jsonl(path: Path) -> tuple[Item, ...]:
    """Read items from a file with one JSON object per line: question, choices, answer (an index), optionally subject.

    Or every line has a text and its label, a name or a number. The text is then the question of an item, and all labels
    of the file are its choices.

    Raises:
        ValueError: the file is unreadable or empty, or a line, whose number is given, violates the schema.
    """
    items: list[Item] = []
    labelled: list[tuple[str, str]] = []
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise Refusal(f"{path}: larger than {_LARGEST_FILE} bytes; a sample of its questions is enough")
        for number, line in read_lines(path, _MAX_LINE):
            if line.strip():
                if len(items) + len(labelled) == _MOST:
                    raise Refusal(f"{path}: holds more than {_MOST} questions; a sample of them is enough")
                found = _item_of_line(line, f"{path}, line {number}")
                if isinstance(found, Item) and not labelled:
                    items.append(found)
                elif isinstance(found, tuple) and not items:
                    labelled.append(found)
                else:
                    raise Refusal(f"{path}, line {number}: all lines must have questions, or all must have labels")
    except OSError as error:
        raise Refusal(f"proxy file {str(path)!r} cannot be read: {error.strerror}") from error
    if labelled:
        labels = tuple(sorted({label for _, label in labelled}))
        try:
            return tuple(Item(text, labels, labels.index(label)) for text, label in labelled)
        except ValueError as error:
            raise Refusal(f"{path}: its labels are the choices: {error}") from error
    if not items:
        raise Refusal(f"{path}: holds no item")
    return tuple(items)


def _item_of_line(line: str, where: str) -> Item | tuple[str, str]:
    try:
        record = parse(line)
    except Refusal as error:
        raise Refusal(f"{where}: must be a JSON object without duplicate keys ({error})") from error
    if not isinstance(record, dict):
        raise Refusal(f"{where}: must be a JSON object, got {line.strip()!r:.60}")
    if record.keys() == set(_LABELLED):
        return _labelled(record, where)
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


def _labelled(record: Mapping[str, object], where: str) -> tuple[str, str]:
    """The text and label of a line; a number becomes text."""
    text, label = record["text"], record["label"]
    if not isinstance(text, str) or not text.strip():
        raise Refusal(f"{where}: 'text' must be text, got {shown(text, 60)}")
    if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
        raise Refusal(f"{where}: 'label' must be a name or a whole number, got {shown(label, 60)}")
    return text, str(label)

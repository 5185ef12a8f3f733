"""Formats JSON for people, with short lists on one line."""

from __future__ import annotations

import json

__all__ = ["pretty_json"]

_WIDTH = 120  # longest line, in characters, that still holds a whole list


def pretty_json(value: object, indent: str = "") -> str:
    """Return JSON indented by two spaces per level, with each list of plain values on one line if it fits."""
    flat = json.dumps(value, ensure_ascii=False, allow_nan=False)
    inner = indent + "  "
    nested = isinstance(value, dict) or (isinstance(value, list) and any(isinstance(x, dict | list) for x in value))
    if not value or (not nested and (not isinstance(value, list) or len(inner) + len(flat) <= _WIDTH)):
        return flat
    if isinstance(value, dict):
        rows = [
            f"{inner}{json.dumps(key, ensure_ascii=False)}: {pretty_json(one, inner)}" for key, one in value.items()
        ]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    assert isinstance(value, list)
    return "[\n" + ",\n".join(inner + pretty_json(one, inner) for one in value) + f"\n{indent}]"

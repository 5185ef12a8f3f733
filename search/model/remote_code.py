"""Find the code that comes with a model. It is run only where the user asks for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from compression.refusal import Refusal
from search.model.sources import locate
from search.runtime.files import file_digest

__all__ = ["code_digests"]


def code_digests(name: str) -> dict[str, str]:
    """The sha256 in hex of every Python file of a model, by its path in the model's folder; none of them is run.

    Raises:
        ValueError: as for `search.model.sources.locate`; or the model refers to code that is not in its folder.
        DataUnavailable: as for `search.model.sources.locate`.
    """
    folder = locate(name, trusted=True).folder
    if folder is None:
        return {}
    for file in sorted(folder.glob("*.json")):
        if elsewhere := next((each for each in _references(file) if "--" in each), None):
            raise Refusal(
                f"model {name!r} refers to code of another repository ({elsewhere} in {file.name}); copy that code "
                "into the folder and refer to it there"
            )
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in sorted(folder.rglob("*.py"))}


def _references(file: Path) -> Iterator[str]:
    """The classes that `auto_map` in a JSON file names."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    named = document.get("auto_map") if isinstance(document, dict) else None
    for found in named.values() if isinstance(named, dict) else [named]:
        yield from (each for each in (found if isinstance(found, list) else [found]) if isinstance(each, str))

"""The digest of a finished run: what the run is made of, so that every later command notices a change.

A run that finishes writes digest.json. It holds the digests of its model and the top-level entries of its JSON files:
short values as they are, all others as a digest, and one digest over all of that. Knows files; the caller says which of
them make up a run.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from compression.refusal import Refusal
from compression.storage.strict_json import bounded_text, json_digest, parse, read_object
from search.runtime.run_folder import CONFIG, DIGEST, ENVIRONMENT, RunFolder

__all__ = ["refuse_changed", "write_digest"]

_FORMAT, _VERSION = "chisel-run", 1
_LARGEST_FILE = 1 << 24  # bytes of digest.json
_SHORT = 80  # characters of a value that is stored as it is
_SHOWN = 3  # differences in a message


def write_digest(folder: RunFolder, files: Sequence[str], model: Mapping[str, str], free: Collection[str] = ()) -> str:
    """Write digest.json into the folder of a run that finished; returns the digest over everything.

    Args:
        files: names of JSON files; one that does not exist is recorded as absent.
        model: digests of the model that the run used, by part.
        free: fields of config.json that may change afterwards.
    """
    parts: dict[str, Mapping[str, object] | None] = {name: _entries(folder / name) for name in files}
    if (config := parts.get(CONFIG)) is not None:
        parts[CONFIG] = {name: value for name, value in config.items() if name not in free}
    made_of = {"model": dict(model), **parts}
    digest = json_digest(made_of)
    folder.write_json(DIGEST, {"format": _FORMAT, "version": _VERSION, "digest": digest, "made_of": made_of})
    return digest


def refuse_changed(run: Path, note: Callable[[str], None] = lambda text: None) -> Mapping[str, str]:
    """Refuse a finished run of which a file was changed, added or removed since.

    Args:
        note: receives one line if the run is of an earlier version, which wrote no digest.

    Returns:
        The digests of the run's model by part; empty for a run of an earlier version.

    Raises:
        Refusal: names what differs and what to do.
    """
    if not (run / DIGEST).exists():
        if _expects_digest(run):
            raise Refusal(f"{run} has no {DIGEST}: the run did not finish, or the file was removed; {_resume(run)}")
        note(f"{run} is of an earlier version, which recorded no digest of it: changes to its files are not noticed")
        return MappingProxyType({})
    document = read_object(run / DIGEST, "the digest of the run", _LARGEST_FILE)
    made_of, version = document.get("made_of"), document.get("version")
    if document.get("format") != _FORMAT or version != _VERSION or not isinstance(made_of, dict):
        raise Refusal(f"{run / DIGEST} must be {_FORMAT} of version {_VERSION}, got version {version!r:.20}")
    if document.get("digest") != json_digest(made_of):
        raise Refusal(f"{run / DIGEST} was changed after the run finished; {_resume(run)}")
    model: Mapping[str, str] = made_of.pop("model")
    found = [difference for name, known in made_of.items() for difference in _differences(name, known, run / name)]
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        shown = "; ".join(found[:_SHOWN])
        raise Refusal(f"{run} was changed after it finished: {shown}{more}; undo that, or {_resume(run)}")
    return model


def _differences(name: str, known: Mapping[str, object] | None, path: Path) -> list[str]:
    """One phrase for each difference between the recorded entries of a file and its present ones."""
    try:
        now = _entries(path)
    except (ValueError, OSError) as error:
        return [f"{name} cannot be read ({error})"]
    if known is None or now is None:
        return [] if known is now else [f"{name} was {'removed' if now is None else 'added'}"]
    return [_phrase(name, key, value, now.get(key)) for key, value in known.items() if now.get(key) != value]


def _phrase(name: str, key: str, before: object, after: object) -> str:
    if isinstance(before, list) or isinstance(after, list):
        return f"{key} of {name} differs"
    return f"{key} of {name} was {json.dumps(before)}, is {json.dumps(after)}"


def _entries(path: Path) -> dict[str, object] | None:
    """The top-level entries of a JSON object, long values as a list with their digest; None if there is no file.

    A file that holds another value has the one entry "content". Raises ValueError if it is not JSON.
    """
    if not path.exists():
        return None
    content = parse(bounded_text(path, "the file"))
    if not isinstance(content, dict):
        content = {"content": content}
    return {key: _brief(value) for key, value in content.items()}


def _brief(value: object) -> object:
    """The value if it is plain and short, otherwise a list of one digest."""
    plain = value is None or isinstance(value, bool | int | float | str)
    return value if plain and len(json.dumps(value)) <= _SHORT else [json_digest(value)]


def _expects_digest(run: Path) -> bool:
    """Whether a run was started by a version that writes digest.json."""
    try:
        return "digest" in read_object(run / ENVIRONMENT, "the environment")
    except Refusal:
        return False


def _resume(run: Path) -> str:
    return f"make its results again with: {shlex.join(['python', 'search.py', 'resume', str(run)])}"

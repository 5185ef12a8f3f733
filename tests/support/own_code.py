"""A tiny model whose architecture is defined by a Python file beside its weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import transformers.dynamic_module_utils as dynamic

from search.model.loading import load_model

CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

(Path(__file__).resolve().parents[2] / "ran").touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def run_afresh(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make transformers copy code to a new folder and run it even if an earlier test ran it."""
    patch.setattr(sys, "path", [*sys.path])
    patch.setattr(dynamic, "HF_MODULES_CACHE", str(folder / "modules"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        patch.delitem(sys.modules, name)


def model_with_code(path: Path) -> Path:
    """The folder of such a model; its file leaves a file `ran` two folders above itself where it is run."""
    loaded = load_model("random:tiny-llama", "cpu")
    loaded.model.save_pretrained(path)
    loaded.tokenizer.save_pretrained(path)
    document = json.loads((path / "config.json").read_text())
    document |= {"model_type": "own", "architectures": ["OwnModel"]}
    document["auto_map"] = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    (path / "config.json").write_text(json.dumps(document))
    (path / "own_code.py").write_text(CODE)
    return path

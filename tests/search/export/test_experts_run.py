"""From a run on a mixture of experts to its exported folders, on the real pipeline with tiny models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_data import fake_data  # noqa: F401 (a fixture)
from small_run import words
from tiny_model import assert_same_logits

from compression.layers.experts import experts_apart
from search import cli
from search.export.restore import restore
from search.healing.state import StoredWeights
from search.model.loading import load_for_use, load_model
from search.priors.format import Prior
from search.runtime.console import Console

PROMPT = torch.arange(40).reshape(2, 20)
_FRESH = """
import sys, torch, transformers
try:
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
    sys.exit("loaded without the code of the folder")
except (ValueError, RuntimeError):
    pass
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "compression" not in sys.modules
torch.save(model(torch.arange(40).reshape(2, 20)).logits, sys.argv[2])
"""


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model.to(torch.float32)(PROMPT).logits
    return found


def done(*given: object) -> None:
    assert cli.main([str(word) for word in given]) == cli.DONE


def fresh(code: str, *arguments: Path) -> None:
    """Run code in a process that knows nothing of this project."""
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=arguments[0], check=True)


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_a_run_on_a_mixture_compresses_its_experts_and_every_export_loads_afresh(tmp_path: Path) -> None:
    run, console = tmp_path / "run", Console(quiet=True)
    done(*words(out=run, budget=2, model="random:tiny-qwen3-moe", target_kept=0.6, repair_tokens=512))
    prior = Prior.read(run / "prior.json")
    experts = [(name, choice) for name, choice in prior.schedule if ".experts." in name]
    assert any(choice.widths for _, choice in experts)
    assert any(not choice.is_dense for _, choice in experts)
    expected = logits(restore(run, console, "cpu", "searched").experiment.loaded.model)
    command = ["export", run, "--quiet", "--device", "cpu", "--dtype", "float32", "--state", "searched"]

    done(*command, "--format", "hf", "--out", tmp_path / "hf")
    compressed = load_for_use(str(tmp_path / "hf"), "cpu").model
    assert experts_apart(compressed)
    assert_same_logits(logits(compressed), expected)
    fresh(_FRESH, tmp_path / "hf", tmp_path / "logits")
    assert_same_logits(torch.load(tmp_path / "logits"), expected)
    compressed.save_pretrained(tmp_path / "again")
    assert_same_logits(logits(load_for_use(str(tmp_path / "again"), "cpu").model), expected)

    done(*command, "--format", "dense", "--out", tmp_path / "dense")
    dense = load_for_use(str(tmp_path / "dense"), "cpu").model
    assert not experts_apart(dense)
    torch.testing.assert_close(logits(dense), expected, rtol=1e-3, atol=1e-3)

    done(
        "heal", run, "--tokens", 300, "--row-tokens", 32, "--batch-tokens", 64, "--quiet", "--out", tmp_path / "healed"
    )
    done(*command[:-2], "--healed", tmp_path / "healed", "--state", "healed", "--out", tmp_path / "healed-hf")
    router = "model.layers.1.mlp.gate.weight"
    trained = StoredWeights.read(tmp_path / "healed").tensors[router]
    assert not torch.equal(trained, load_model("random:tiny-qwen3-moe", "cpu").model.get_parameter(router))
    healed = logits(restore(run, console, "cpu", "healed", tmp_path / "healed").experiment.loaded.model)
    assert_same_logits(logits(load_for_use(str(tmp_path / "healed-hf"), "cpu").model), healed)
    done("export", run, "--quiet", "--device", "cpu", "--quantize", "int8", "--out", tmp_path / "int8")
    load_for_use(str(tmp_path / "int8"), "cpu")

"""From a run that cuts bonds to its exported folders, on the real pipeline with a tiny model."""

import pytest
import torch
from fake_data import fake_data  # noqa: F401 (a fixture)
from safetensors.torch import load_file
from small_run import words
from tiny_model import assert_same_logits

from search import cli
from search.benchmarking.compared_models import compared_models
from search.export.restore import restore
from search.model.loading import load_for_use
from search.priors.format import Prior
from search.runtime.console import Console

PROMPT = torch.arange(40).reshape(2, 20)
HEAL = ["--tokens", "300", "--row-tokens", "32", "--batch-tokens", "64", "--quiet"]


@torch.no_grad()
def logits(model):
    return model.to(torch.float32)(PROMPT).logits


def done(*given):
    assert cli.main([str(word) for word in given]) == cli.DONE


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
@pytest.mark.parametrize(("form", "model"), [("any", "random:tiny-qwen2"), ("plain", "random:tiny-llama")])
def test_a_run_that_cuts_bonds_is_exported_healed_quantized_compared_and_applied(form, model, tmp_path):
    run, console = tmp_path / "run", Console(quiet=True)
    changes = {"budget": 2, "form": form, "model": model, "target_kept": 0.5, "repair_tokens": 512}
    done(*words(out=run, **changes))
    prior = Prior.read(run / "prior.json")
    assert any(choice.widths for _, choice in prior.schedule)
    states = ("searched", "repaired") if prior.was_repaired else ("searched",)
    expected = {state: logits(restore(run, console, "cpu", state).experiment.loaded.model) for state in states}
    command = ["export", run, "--quiet", "--device", "cpu", "--dtype", "float32"]
    for state in states:
        for kind in ("hf", "dense", "gguf-ready"):
            out = tmp_path / f"{state}-{kind}"
            done(*command, "--state", state, "--format", kind, "--out", out)
            found = logits(load_for_use(str(out), "cpu").model)
            torch.testing.assert_close(found, expected[state], rtol=1e-3, atol=1e-3)
    [compared] = compared_models([str(run)], states, torch.device("cpu"), console)
    for state, loaded in zip(compared.names, compared.models(), strict=True):
        assert_same_logits(logits(loaded.model), expected[state])

    done("heal", run, *HEAL, "--out", tmp_path / "weights")
    healed = logits(restore(run, console, "cpu", "healed", tmp_path / "weights").experiment.loaded.model)
    done(*command, "--healed", tmp_path / "weights", "--state", "healed", "--out", tmp_path / "healed")
    assert_same_logits(logits(load_for_use(str(tmp_path / "healed"), "cpu").model), healed)

    done("export", run, "--quiet", "--device", "cpu", "--quantize", "int8", "--out", tmp_path / "int8")
    done("heal", tmp_path / "int8", "--model", model, *HEAL, "--out", tmp_path / "int8-healed")
    tables = [load_file(tmp_path / name / "model.safetensors") for name in ("int8", "int8-healed")]
    assert {name: values.shape for name, values in tables[0].items()} == {
        name: values.shape for name, values in tables[1].items()
    }
    assert all(torch.equal(tables[1][name], codes) for name, codes in tables[0].items() if name.endswith("codes"))
    load_for_use(str(tmp_path / "int8-healed"), "cpu")
    done("heal", tmp_path / "searched-hf", "--model", model, *HEAL, "--out", tmp_path / "folder")
    done("generate", tmp_path / "folder", "--prompt", "abc", "--tokens", "4", "--quiet")
    done("apply", "--prior", run / "prior.json", "--model", model, "--out", tmp_path / "applied", "--quiet")

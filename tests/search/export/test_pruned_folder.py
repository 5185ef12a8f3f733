"""Folders of models with pruned and rounded matrices: what loads computes the same, is as small; damage is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_bonds import SHRINKAGE
from tiny_model import assert_same_logits, assert_same_tensors
from transformers import AutoModelForCausalLM

from compression import FactorCache, FactorStore, ScheduleApplier, collect, dense_weight, discover_sites
from compression.decomposition.entry_store import ladder
from compression.layers.packed import PackedLinear
from compression.layers.sparse_linear import SparseLinear
from compression.numerics.packed_size import BITS
from compression.schedule import DENSE, SPARSE, Choice, Schedule
from compression.size import SizeModel
from search import hf
from search.export.folder import export_dense_, export_model, footprint, forms
from search.export.quantize import module_bits
from search.model.loading import LoadedModel, load_for_use, load_model

MODELS = ("random:tiny-llama", "random:tiny-qwen2", "random:tiny-gpt2")
PROMPT = torch.arange(40).reshape(2, 20)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(PROMPT, attention_mask=torch.ones_like(PROMPT)).logits
    return found


def pruned_model(name: str) -> tuple[LoadedModel, Schedule, int]:
    """A model with a pruned or rounded matrix or an MPO in the place of most of its own, and its counted bytes."""
    loaded = load_model(name, "cpu")
    model, sites = loaded.model, discover_sites(loaded.model)
    batches = [(PROMPT, torch.ones_like(PROMPT, dtype=torch.bool))]
    weights = {site.name: dense_weight(model.get_submodule(site.name)).clone() for site in sites}
    statistics = collect(model, sites, batches, torch.Generator().manual_seed(0))
    store = FactorStore(sites, weights, lambda: statistics, "key", SHRINKAGE, FactorCache(None))
    kinds = [DENSE, Choice("pivoted-lowrank", 3, "two-sided")]
    kinds += [Choice("dense", 0, "two-sided", bits=bits) for bits in BITS[: len(sites) // 2]]
    kinds += [Choice(SPARSE, ladder(sites[len(kinds)], 3)[0], "two-sided", bits=3)]
    choices = [
        (site.name, kinds[number] if number < len(kinds) else Choice(SPARSE, ladder(site)[number % 9], "two-sided"))
        for number, site in enumerate(sites)
    ]
    schedule = Schedule(tuple(choices))
    counted = SizeModel(model, sites).size(schedule).bytes
    ScheduleApplier(model, store, packed=True).apply_(schedule)
    return loaded, schedule, counted


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_computes_what_was_exported_is_as_small_and_is_written_again(name: str, tmp_path: Path) -> None:
    loaded, schedule, counted = pruned_model(name)
    model, expected = loaded.model, logits(loaded.model)
    export_model(model, loaded.tokenizer, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert sum(each.numel() * each.element_size() for each in tensors.values()) == footprint(model).stored == counted
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]["format"] == hf.FORMAT
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert_same_tensors(read, model)
    pruned = sum(choice.is_sparse for _, choice in schedule)
    assert sum(isinstance(module, SparseLinear) for module in read.modules()) == pruned
    rounded = sum(choice.bits > 0 and not choice.is_sparse for _, choice in schedule)
    assert sum(isinstance(module, PackedLinear) for module in read.modules()) == rounded > 0
    assert footprint(read).stored == counted  # in memory too
    assert_same_logits(logits(read), expected)
    assert_same_logits(logits(load_for_use(str(tmp_path / "hf"), "cpu").model), expected)
    read.save_pretrained(tmp_path / "again")
    assert_same_logits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)
    assert f"and {pruned} are pruned" in forms(model)
    export_dense_(model, loaded.tokenizer, tmp_path / "dense")
    dense = load_model(str(tmp_path / "dense"), "cpu").model
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    torch.testing.assert_close(logits(dense), expected, rtol=1e-3, atol=1e-3)  # an MPO is multiplied out
    for site, choice in schedule:
        if choice.is_sparse:
            assert int(dense_weight(dense.get_submodule(site)).count_nonzero()) <= choice.chi


ALONE = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.arange(40).reshape(2, 20)
with torch.no_grad():
    save_file({"logits": model.eval()(ids, attention_mask=torch.ones_like(ids)).logits}, sys.argv[2])
assert not any(name.split(".")[0] in ("compression", "search") for name in sys.modules)
"""


@pytest.mark.slow
def test_the_code_in_the_folder_reads_it_without_chisel(tmp_path: Path) -> None:
    loaded, _, _ = pruned_model("random:tiny-llama")
    expected = logits(loaded.model)
    export_model(loaded.model, loaded.tokenizer, tmp_path / "hf")
    (tmp_path / "alone.py").write_text(ALONE)
    words = [sys.executable, "-I", "alone.py", "hf", "out.safetensors"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert_same_logits(load_file(tmp_path / "out.safetensors")["logits"], expected)


def test_damaged_masks_and_descriptions_are_refused_in_one_line(tmp_path: Path) -> None:
    loaded, schedule, _ = pruned_model("random:tiny-llama")
    export_model(loaded.model, loaded.tokenizer, tmp_path / "hf")
    name = next(name for name, choice in schedule if choice.is_sparse and not choice.bits)
    file, config = tmp_path / "hf" / "model.safetensors", tmp_path / "hf" / "config.json"
    with safe_open(file, "pt") as opened:
        metadata, tensors = dict(opened.metadata()), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    said = config.read_text()

    def refused(change: dict[str, torch.Tensor], **described: object) -> str:
        """The refusal of changed tensors and a changed description, with checksums made by whoever changed them."""
        now = tensors | change
        checksums = {key: hf._checksum(key, values) for key, values in now.items()}
        settings, document = json.loads(metadata["chisel_config"]), json.loads(said)
        for modules in (settings["quantization_config.modules"], document["quantization_config"]["modules"]):
            modules[name] |= described
        config.write_text(json.dumps(document))
        words = {"chisel_sha256": json.dumps(checksums), "chisel_config": json.dumps(settings)}
        save_file(now, file, {**metadata, **words})
        with pytest.raises(ValueError, match=name) as raised:
            AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        assert "\n" not in str(raised.value)
        return str(raised.value)

    mask, values = tensors[f"{name}.bitmask"], tensors[f"{name}.values"]
    flipped = mask.clone()
    flipped[0, 0] ^= 1
    assert "the mask is damaged: it names" in refused({f"{name}.bitmask": flipped})
    assert "has shape" in refused({f"{name}.bitmask": mask[1:].contiguous()})
    assert "has shape" in refused({f"{name}.values": values[1:].contiguous()})
    fewer = refused({f"{name}.values": values[1:].contiguous()}, kept=len(values) - 1)
    assert f"it names {len(values)} entries, but ({len(values) - 1},) values are stored" in fewer
    for wrong in (0, 1 << 40, "7", True):
        assert "the entries that are stored must be 1 to" in refused({}, kept=wrong)


def test_pruned_matrices_keep_their_numbers_where_the_rest_is_quantized() -> None:
    loaded, schedule, _ = pruned_model("random:tiny-llama")
    bits = module_bits(loaded.model, discover_sites(load_model("random:tiny-llama", "cpu").model), "mixed")
    assert set(bits).isdisjoint(name for name, choice in schedule if choice.is_sparse)
    assert next(name for name, choice in schedule if choice.is_dense) in bits

"""Stored weights of sites whose bonds are cut: they come back at their reduced shapes, and others are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_bonds import Subject

from compression.sites import put_modules
from search.healing.state import REPAIR, StoredWeights, load_sites_, site_tensors, write_weights

MODELS = ("random:tiny-llama", "random:tiny-qwen2", "random:tiny-gpt2")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share, chi, heads", [(0.5, 0, True), (0.5, 4, True), (0, 0, False)])
def test_repaired_weights_of_reduced_shapes_are_stored_and_put_back(
    name: str, share: float, chi: int, heads: bool, tmp_path: Path
) -> None:
    subject = Subject.of(name)
    model, ids = subject.model, subject.batches[0][0]
    schedule, dense = subject.schedule(share, chi, heads), model(input_ids=ids).logits
    taken = subject.repair_(schedule)
    repaired = model(input_ids=ids).logits
    write_weights(tmp_path, REPAIR, model, subject.sites, {})
    put_modules(model, taken)
    undo = StoredWeights.read(tmp_path, REPAIR).put_(model, subject.sites, schedule)
    assert torch.equal(model(input_ids=ids).logits, repaired)
    for site in subject.sites:
        layer = model.get_submodule(site.name)
        assert (layer.out_features, layer.in_features) == site.shape(schedule[site.name].widths)
    undo()
    assert torch.equal(model(input_ids=ids).logits, dense)


@pytest.mark.parametrize("chi", [0, 4])
def test_weights_of_other_widths_are_refused_in_one_line_and_the_model_stays_dense(chi: int) -> None:
    subject = Subject.of("random:tiny-qwen2")
    model, schedule = subject.model, subject.schedule(0.5, chi)
    taken = subject.repair_(schedule)
    tensors = site_tensors(model, subject.sites)
    put_modules(model, taken)
    before = dict(model.named_modules())
    wrong = {
        "another width": (subject.schedule(0.75, chi, heads=False), tensors),
        "the whole matrix": (subject.schedule(1, chi), tensors),
        "a longer bias": (
            schedule,
            {
                name: torch.zeros(16) if name.endswith("0.self_attn.k_proj.bias") else each
                for name, each in tensors.items()
            },
        ),
    }
    for what, (other, stored) in wrong.items():
        with pytest.raises(ValueError, match="stored tensors do not fit") as error:
            load_sites_(model, subject.sites, other, stored)
        assert "\n" not in str(error.value), what
        assert dict(model.named_modules()) == before

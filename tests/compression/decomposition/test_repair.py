"""Repair: nothing to do for a dense schedule, less error than without it, writers of the residual stream found."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from compression import Schedule, Site, Statistics, collect, discover_sites, uniform_schedule
from compression.calibration.blocks import record_blocks
from compression.decomposition.repair import _groups, _start, _Targets, repair_
from compression.decomposition.unfinished_repair import UnfinishedRepair
from compression.numerics.elimination import Elimination
from compression.schedule import DENSE
from compression.sites import model_parameters, put_modules
from compression.size import SizeModel
from compression.storage.factor_cache import FactorCache
from search.model.loading import load_model

MODELS = ("random:tiny-llama", "random:tiny-gpt2", "random:tiny-qwen2")


def subject(name: str):  # type: ignore[no-untyped-def]
    loaded = load_model(name, torch.device("cpu"), torch.float32)
    model, sites = loaded.model, discover_sites(loaded.model)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(6):
        ids = torch.randint(0, model.config.vocab_size, (8, 40), generator=generator)
        batches.append((ids, torch.ones_like(ids, dtype=torch.bool)))
    batches[-1][1][3, 25:] = False
    statistics = collect(model, sites, batches, torch.Generator().manual_seed(1))
    return model, sites, statistics, batches


def uncut(bond: str) -> Elimination:
    raise AssertionError(f"no schedule of this file cuts {bond}")


def divergence(model: torch.nn.Module, dense: list[torch.Tensor], batches: list) -> float:  # type: ignore[type-arg]
    with torch.no_grad():
        logits = [model(input_ids=ids, attention_mask=mask.long()).logits for ids, mask in batches]
    total = [
        torch.nn.functional.kl_div(one.log_softmax(-1), two.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        for one, two in zip(logits, dense, strict=True)
    ]
    return float(torch.cat([values[mask] for values, (_, mask) in zip(total, batches, strict=True)]).mean())


@pytest.mark.parametrize("name", MODELS)
def test_a_dense_schedule_needs_no_repair_and_the_taken_modules_restore_the_model(name: str) -> None:
    model, sites, statistics, batches = subject(name)
    before = model(input_ids=batches[0][0]).logits
    taken = repair_(model, sites, Schedule.dense(tuple(site.name for site in sites)), statistics, batches, 0.003, uncut)
    torch.testing.assert_close(model(input_ids=batches[0][0]).logits, before, atol=2e-3, rtol=2e-3)
    for path, module in taken.items():
        model.set_submodule(path, module)
    assert torch.equal(model(input_ids=batches[0][0]).logits, before)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("topology", ["pivoted-lowrank", "pivoted-mpo2"])
@pytest.mark.slow
def test_repair_lowers_the_divergence_from_the_dense_model_at_equal_parameters(name: str, topology: str) -> None:
    model, sites, statistics, batches = subject(name)
    with torch.no_grad():
        dense = [model(input_ids=ids, attention_mask=mask.long()).logits for ids, mask in batches]
    target = int(0.6 * sum(site.parameters for site in sites))
    schedule = uniform_schedule(sites, topology, "two-sided", target)
    counted = SizeModel(model, sites).size(schedule).parameters
    values, sizes = [], []
    for correct in (False, True):
        taken = repair_(model, sites, schedule, statistics, batches, 0.003, uncut, correct=correct)
        values.append(divergence(model, dense, batches))
        sizes.append(model_parameters(model))
        for path, module in taken.items():
            model.set_submodule(path, module)
    assert values[1] < 0.9 * values[0]
    assert sizes == [counted, counted]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_a_16_bit_model_is_repaired_like_one_in_float32_and_stays_what_it_was(name: str, dtype: torch.dtype) -> None:
    narrow, sites, statistics, batches = subject(name)
    narrow.to(dtype)
    wide = copy.deepcopy(narrow).float()
    schedule = uniform_schedule(
        sites, "pivoted-lowrank", "two-sided", int(0.6 * sum(site.parameters for site in sites))
    )
    held = {
        path: (tensor, tensor.data_ptr(), tensor.dtype) for path, tensor in narrow.state_dict(keep_vars=True).items()
    }
    found = []
    for model in (narrow, wide):
        taken = repair_(model, sites, schedule, statistics, batches, 0.003, uncut)
        found.append({site.name: model.get_submodule(site.name).weight.float() for site in sites})
        kinds = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
        assert kinds == {dtype if model is narrow else torch.float32}
        put_modules(model, taken)
    for path, one in found[0].items():
        assert float((one - found[1][path]).norm()) < 0.02 * float(one.norm()), path
    now = narrow.state_dict(keep_vars=True)
    assert all(
        now[path] is one and one.data_ptr() == at and one.dtype == kind for path, (one, at, kind) in held.items()
    )


@pytest.mark.parametrize(
    "name, writers", [("random:tiny-llama", {"o_proj", "down_proj"}), ("random:tiny-gpt2", {"c_proj"})]
)
def test_sites_that_write_to_the_residual_stream_are_found_and_give_the_next_states(
    name: str, writers: set[str]
) -> None:
    model, sites, statistics, batches = subject(name)
    with torch.no_grad():
        [block], states = record_blocks(model, [sites[0].name.split(".0.")[0] + ".0"], batches)
        groups = _groups([site for site in sites if site.block == 0], statistics)
        targets = _Targets(block, groups, states, [mask for _, mask in batches])
        for number in range(len(groups)):
            starts = [
                _start(site, model.get_submodule(site.name), DENSE, statistics, 0.003, uncut) for site in groups[number]
            ]
            targets.moments(number, states, starts)
        for given, expected in zip(targets.advance(states), targets.outputs, strict=True):
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    found = [group[0] for group, stream in zip(groups, targets._streams, strict=True) if stream is not None]
    assert {site.name.rsplit(".", 1)[-1] for site in found} == writers
    assert len(found) == 2


def test_sites_that_write_to_the_residual_stream_are_found_in_16_bits_beside_outputs_in_the_thousands() -> None:
    model, sites, statistics, batches = subject("random:tiny-llama")
    model.to(torch.bfloat16)
    outlet = model.get_submodule("model.layers.0.mlp.down_proj")
    with torch.no_grad():
        outlet.weight[0] *= 4000 / outlet.weight[0].abs().mean()
        [block], states = record_blocks(model, ["model.layers.0"], batches)
        groups = _groups([site for site in sites if site.block == 0], statistics)
        targets = _Targets(block, groups, states, [mask for _, mask in batches])
    assert targets.outputs[0].abs().max() > 1000
    found = [group[0] for group, stream in zip(groups, targets._streams, strict=True) if stream is not None]
    assert [site.name.rsplit(".", 1)[-1] for site in found] == ["o_proj", "down_proj"]


def test_one_sequence_is_too_few_to_tell_what_a_correction_is_worth() -> None:
    site, batch = Site("a", 0, "q", 4, 4), (torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool))
    none = Statistics({}, {}, {}, 0)
    with pytest.raises(ValueError, match="2 sequences"):
        repair_(torch.nn.Linear(4, 4), [site], Schedule.dense(("a",)), none, [batch], 0.1, uncut)


def test_a_model_that_is_compressed_already_is_refused() -> None:
    model, sites, statistics, batches = subject("random:tiny-llama")
    schedule = uniform_schedule(sites, "lowrank", "two-sided", int(0.6 * sum(site.parameters for site in sites)))
    repair_(model, sites, schedule, statistics, batches, 0.003, uncut, correct=False)
    with pytest.raises(ValueError, match=f"site {sites[0].name} is already compressed"):
        repair_(model, sites, schedule, statistics, batches, 0.003, uncut)


def test_an_interrupted_repair_leaves_the_model_dense_and_continues_after_its_last_block_to_the_same_weights(
    tmp_path: Path,
) -> None:
    model, sites, statistics, batches = subject("random:tiny-llama")
    schedule = uniform_schedule(sites, "lowrank", "two-sided", int(0.6 * sum(site.parameters for site in sites)))
    before = dict(model.named_modules())

    def repaired(kept: UnfinishedRepair, stop: int) -> tuple[list[int], dict[str, torch.Tensor]]:
        """The counts of blocks that a repair tells, and the weights that it ends with; none if it is interrupted."""
        told: list[int] = []

        def progress(done: int) -> None:
            told.append(done)
            if done == stop:
                raise KeyboardInterrupt

        try:
            taken = repair_(
                model, sites, schedule, statistics, batches, 0.003, uncut, progress=progress, unfinished=kept
            )
        except KeyboardInterrupt:
            assert dict(model.named_modules()) == before
            return told, {}
        weights = dict(model.state_dict())
        put_modules(model, taken)
        return told, weights

    last = 1 + sites[-1].block
    stored = UnfinishedRepair(FactorCache(tmp_path, warn=lambda text: None), "a repair")
    told, whole = repaired(UnfinishedRepair(FactorCache(None), ""), 0)
    assert told == list(range(1, last + 1))
    for stop in (1, last - 1):
        assert not repaired(stored, stop)[1]
    assert stored.blocks == last - 1
    told, weights = repaired(stored, 0)
    assert told == [last - 1, last]
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[name], values) for name, values in whole.items())
    lost = next(path for path in tmp_path.rglob("*.safetensors") if stored._block(1) in path.name)
    lost.write_bytes(lost.read_bytes()[:-1])
    assert repaired(stored, 1)[0] == [1]  # from the start, as the first block is damaged
    stored.drop()
    assert not list(tmp_path.rglob("*.safetensors"))

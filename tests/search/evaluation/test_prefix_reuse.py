"""Hidden states kept between evaluations: the same scores bit for bit, fewer blocks run, never a stale state."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from compression import Choice, FactorCache, FactorStore, Schedule, dense_weight, discover_sites
from compression.schedule import DENSE
from search.evaluation.evaluator import ModelEvaluator
from search.evaluation.packed_sequences import packed_item, packed_text
from search.evaluation.prefix_reuse import HiddenStates, prefix_keys
from search.evaluation.workload import Workload
from search.model.loading import LoadedModel, load_model

CPU = torch.device("cpu")
LIMIT = 1 << 26


@pytest.fixture(params=["random:tiny-llama", "random:tiny-gpt2", "random:tiny-qwen2", "random:tiny-gemma2"])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return load_model(request.param, "cpu")


@pytest.fixture
def llama() -> LoadedModel:
    return load_model("random:tiny-llama", "cpu")


def store_of(loaded: LoadedModel) -> FactorStore:
    sites = discover_sites(loaded.model)
    weights = {site.name: dense_weight(loaded.model.get_submodule(site.name)).clone() for site in sites}

    def none() -> None:
        raise AssertionError("the plain metric needs no statistics")

    return FactorStore(sites, weights, none, "none", 0.01, FactorCache(None))  # type: ignore[arg-type]


def workload(loaded: LoadedModel, batch_tokens: int = 40) -> Workload:
    texts = ["Something that is read.", "And a second text, a little longer.", "The third one."]
    item = packed_item(loaded.encode, "Question: What?\nAnswer:", (" this", " that one"), 1)
    return Workload([item, *(packed_text(loaded.encode(text)) for text in texts)], loaded.model, batch_tokens)


def evaluator_of(loaded: LoadedModel, limit: int = LIMIT) -> ModelEvaluator:
    return ModelEvaluator(loaded.model, store_of(loaded), [workload(loaded)], reuse_bytes=limit)


def choosing(evaluator: ModelEvaluator, *chi: int) -> Schedule:
    """The plain low rank χ of every block, 0 for dense."""
    choices = [Choice("lowrank", value, "plain") if value else DENSE for value in chi]
    return Schedule(tuple((site.name, choices[site.block]) for site in evaluator.states.sites))


# Walks that come back, change the first, a middle and the last block, and are dense at the beginning.
WALK = [(3, 3, 3), (3, 3, 5), (3, 4, 5), (3, 3, 3), (0, 0, 4), (0, 2, 4), (6, 2, 4), (3, 4, 5), (0, 0, 0)]


def test_scores_equal_those_of_whole_passes_bit_for_bit(loaded: LoadedModel) -> None:
    def scores(limit: int) -> tuple[list[object], ModelEvaluator]:
        evaluator = evaluator_of(loaded, limit)
        found = [score.quality for score in evaluator.evaluate([choosing(evaluator, *chi) for chi in WALK])]
        evaluator.close()
        return list(found), evaluator

    whole, without = scores(0)
    reused, with_states = scores(LIMIT)
    assert reused == whole
    assert without.states.blocks_skipped == 0
    batches = (with_states.states.blocks_skipped + with_states.states.blocks_run) // (3 * (1 + len(WALK)))
    # (dense reference 0,) 0, 2, 1, 3, 2, 1, 0, 3, 3
    assert with_states.states.blocks_skipped == 15 * batches


def test_alternating_schedules_both_hit(llama: LoadedModel) -> None:
    evaluator = evaluator_of(llama)
    first, second = choosing(evaluator, 3, 3, 3), choosing(evaluator, 5, 3, 3)
    evaluator.evaluate([first, second])
    run = evaluator.states.blocks_run
    evaluator.evaluate([first, second, first])
    assert evaluator.states.blocks_run == run


def test_a_change_behind_the_evaluators_back_is_noticed(loaded: LoadedModel) -> None:
    evaluator = evaluator_of(loaded)
    schedule = choosing(evaluator, 0, 3, 3)
    [before] = evaluator.evaluate([schedule])
    norm = next(parameter for name, parameter in loaded.model.named_parameters() if "ln_1" in name or "norm" in name)
    with torch.no_grad():
        norm.add_(0.5)
    [changed] = evaluator.evaluate([schedule])
    assert changed.kl != before.kl
    evaluator.states.forget()
    assert evaluator.evaluate([schedule])[0].kl == changed.kl
    with torch.no_grad():
        norm.sub_(0.5)
    assert evaluator.evaluate([schedule])[0].kl == pytest.approx(before.kl, rel=1e-4)


def test_a_module_replaced_behind_the_evaluators_back_is_noticed(llama: LoadedModel) -> None:
    evaluator = evaluator_of(llama)
    schedule = choosing(evaluator, 0, 3, 3)
    [before] = evaluator.evaluate([schedule])
    layer = llama.model.model.layers[0]
    layer.mlp.gate_proj = nn.Linear(32, 48, bias=False).requires_grad_(False)
    assert evaluator.evaluate([schedule])[0].kl != before.kl


def test_a_hook_added_behind_the_evaluators_back_is_noticed(llama: LoadedModel) -> None:
    evaluator = evaluator_of(llama)
    schedule = choosing(evaluator, 0, 3, 3)
    [before] = evaluator.evaluate([schedule])
    hook = llama.model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: 2 * output)
    assert evaluator.evaluate([schedule])[0].kl != before.kl
    hook.remove()
    assert evaluator.evaluate([schedule])[0].kl == before.kl


def test_a_model_given_back_and_taken_again_scores_the_same(loaded: LoadedModel) -> None:
    evaluator = evaluator_of(loaded)
    schedule = choosing(evaluator, 3, 0, 4)
    [before] = evaluator.evaluate([schedule])
    evaluator.close()
    assert evaluator.states.kept_bytes == 0
    assert all("forward" not in module.__dict__ for module in loaded.model.modules())
    [after] = evaluator.evaluate([schedule])
    assert after.quality == before.quality


def test_a_pass_that_fails_leaves_nothing_behind(llama: LoadedModel) -> None:
    evaluator = evaluator_of(llama)
    good, bad = choosing(evaluator, 3, 3, 3), choosing(evaluator, 3, 3, 4)
    [expected] = evaluator.evaluate([good])

    def fail(*_: object) -> None:
        raise RuntimeError("broken on the way")

    hook = llama.model.model.layers[2].mlp.register_forward_hook(fail)
    [failed] = evaluator.evaluate([bad])
    hook.remove()
    assert failed.state == "failed"
    assert evaluator.states.kept_bytes == 0
    assert all("forward" not in module.__dict__ for module in llama.model.modules())
    assert evaluator.evaluate([good])[0].quality == expected.quality


@pytest.mark.parametrize("share", [0.05, 0.4, 0.7, 1.0, 2.0])
def test_the_limit_of_memory_holds_and_scores_stay(llama: LoadedModel, share: float) -> None:
    one_run = workload(llama).padded_tokens * 32 * 4 * 3
    reference = evaluator_of(llama, 0)
    schedules = [choosing(reference, *chi) for chi in WALK]
    expected = [score.quality for score in reference.evaluate(schedules)]
    reference.close()
    evaluator = evaluator_of(llama, limit := int(share * 2 * one_run))
    for schedule, quality in zip(schedules, expected, strict=True):
        assert evaluator.evaluate([schedule])[0].quality == quality
        assert evaluator.states.kept_bytes <= limit
    assert (evaluator.states.kept_bytes > 0) == (share > 1 / 3)


class Remembering(nn.Module):
    """A block that hands the next one something besides its output."""

    box: ClassVar[dict[str, torch.Tensor]] = {}

    def __init__(self, number: int, own: str) -> None:
        super().__init__()
        self.linear, self.number, self.own = nn.Linear(4, 4), number, own

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output = hidden + torch.tanh(self.linear(hidden))
        if self.own == "in place":
            hidden.mul_(2.0)
        if self.own == "shared":
            output = output + self.box.get("last", torch.zeros(()))
            self.box["last"] = output.mean()
        if self.own == "random":
            output = nn.functional.dropout(output, 0.5)
        return output


class Toy(nn.Module):
    def __init__(self, own: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 4)
        self.layers = nn.ModuleList([Remembering(number, own) for number in range(4)])

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
        Remembering.box.clear()
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return type("Output", (), {"logits": hidden})


@pytest.mark.parametrize(("own", "safe"), [("", True), ("in place", False), ("shared", False), ("random", False)])
def test_models_whose_blocks_share_more_than_their_outputs_are_not_reused(own: str, safe: bool) -> None:
    model = Toy(own)
    states = HiddenStates(model, discover_sites(model), 100, LIMIT)
    assert states.verify() == safe
    keys = prefix_keys(Schedule.dense(tuple(site.name for site in states.sites)), states.sites, 4)
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        for _ in range(2):
            states(keys, "batch", lambda: model(ids, use_cache=False).logits)  # type: ignore[attr-defined]
    assert (states.blocks_skipped > 0) == safe


def test_prefix_keys_differ_from_the_first_changed_block_on(llama: LoadedModel) -> None:
    sites = discover_sites(llama.model)
    dense = Schedule.dense(tuple(site.name for site in sites))
    changed = Schedule(tuple((s.name, Choice("lowrank", 2, "plain") if s.block == 1 else DENSE) for s in sites))
    same = [one == other for one, other in zip(*(prefix_keys(s, sites, 3) for s in (dense, changed)), strict=True)]
    assert same == [True, False, False]


def test_a_negative_limit_is_refused(llama: LoadedModel) -> None:
    with pytest.raises(ValueError, match="at least 0 bytes"):
        HiddenStates(llama.model, discover_sites(llama.model), 1, -1)

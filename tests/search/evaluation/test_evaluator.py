"""The evaluator: scores of schedules, states, restoring."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from tiny_evaluator import evaluator_of, everywhere

from compression import Choice, FactorStore, Schedule
from envs import Reward
from search.evaluation.evaluator import ModelEvaluator
from search.evaluation.packed_sequences import packed_item, packed_text
from search.evaluation.quality import Quality, paired_kl
from search.evaluation.score import Score
from search.evaluation.workload import Workload
from search.model.loading import LoadedModel, load_model


@pytest.fixture
def loaded() -> LoadedModel:
    return load_model("random:tiny-llama", "cpu")


def test_scores_come_in_order_and_do_not_depend_on_what_was_applied_before(loaded: LoadedModel) -> None:
    evaluator, store = evaluator_of(loaded)
    low, high = everywhere(store, 2), everywhere(store, 7)
    first = evaluator.evaluate([low, high, low])
    second = evaluator.evaluate([high])
    assert first[0].kl == first[2].kl
    assert first[1].kl == second[0].kl
    assert first[1].kl < first[0].kl
    assert first[0].kept_fraction < first[1].kept_fraction < 1


def test_the_dense_schedule_scores_as_the_dense_model(loaded: LoadedModel) -> None:
    evaluator, store = evaluator_of(loaded)
    [score] = evaluator.evaluate([Schedule.dense(tuple(site.name for site in store.sites))])
    assert score.kl == pytest.approx(0, abs=1e-5)
    assert score.kept_fraction == 1
    assert score.quality.accuracy == evaluator.dense.quality.accuracy


def test_closing_gives_the_model_back_bit_for_bit(loaded: LoadedModel) -> None:
    before = copy.deepcopy(loaded.model.state_dict())
    evaluator, store = evaluator_of(loaded)
    evaluator.evaluate([everywhere(store, 3)])
    evaluator.close()
    after = loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_nonfinite_schedule_is_a_state_and_its_successor_is_fine(loaded: LoadedModel) -> None:
    evaluator, store = evaluator_of(loaded)
    good = everywhere(store, 3)
    [expected] = evaluator.evaluate([good])
    cores = store.cores(store.sites[0].name, Choice("lowrank", 5, "two-sided"))
    cores[0][..., 4] = torch.nan  # only χ of 5 and more sees it
    bad, after = evaluator.evaluate([everywhere(store, 5), good])
    assert bad.state == "nonfinite"
    assert math.isnan(bad.kl)
    assert after.kl == expected.kl


def test_an_evaluation_that_raises_is_failed_with_its_reason(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator, store = evaluator_of(loaded)

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory left\nsecond line")

    monkeypatch.setattr(Workload, "measure", out_of_memory)
    [score] = evaluator.evaluate([everywhere(store, 3)])
    assert score.state == "failed"
    assert score.reason.startswith("OutOfMemoryError: no memory left (even one row at a time")
    assert math.isnan(score.kl)


@pytest.mark.parametrize(
    "shortage",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")],
)
def test_where_memory_runs_out_batches_are_halved_and_the_score_stays(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, shortage: Exception
) -> None:
    evaluator, store = evaluator_of(loaded)
    text = [packed_text(loaded.encode(f"Sentence number {n}, of some length, to be read. " * 6)) for n in range(6)]
    evaluator = ModelEvaluator(loaded.model, store, [Workload(text, loaded.model, 2048)])
    before = evaluator.evaluate([everywhere(store, 3)])[0]
    forward, rows = loaded.model.forward, []

    def two_rows_at_most(*inputs: Any, **named: Any) -> Any:
        rows.append(len(named["input_ids"]))
        if rows[-1] > 2:
            raise shortage
        return forward(*inputs, **named)

    monkeypatch.setattr(loaded.model, "forward", two_rows_at_most)
    evaluator.states.forget()
    [score] = evaluator.evaluate([everywhere(store, 3)])
    assert score.state == "ok"
    assert score.kl == pytest.approx(before.kl, rel=1e-4)
    assert rows[0] > 2
    seen = len(rows)
    assert evaluator.evaluate([everywhere(store, 2)])[0].state == "ok"
    assert max(rows[seen:]) <= 2


def test_slopes_that_fail_are_none_and_the_evaluator_goes_on(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator, store = evaluator_of(loaded)
    low, high = everywhere(store, 2), everywhere(store, 7)
    whole = evaluator.slopes(low, high)
    assert len(whole) == len(store.sites)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    descend = Workload.descend
    monkeypatch.setattr(Workload, "descend", fail)
    assert evaluator.slopes(low, high) == {}
    monkeypatch.setattr(Workload, "descend", descend)
    assert evaluator.slopes(low, high) == pytest.approx(whole, rel=1e-3, abs=1e-6)


def test_one_pass_gives_the_score_and_the_slopes_of_two(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator, store = evaluator_of(loaded)
    low, high = everywhere(store, 2), everywhere(store, 7)
    [score], slopes = evaluator.evaluate([low]), evaluator.slopes(low, high)
    both, same = evaluator.evaluate_with_slopes(low, high)
    numbers = {name: value for name, value in score.to_dict().items() if isinstance(value, float) and name != "seconds"}
    assert (both.state, both.shard) == (score.state, score.shard)
    assert {name: both.to_dict()[name] for name in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-6)
    assert same == pytest.approx(slopes, rel=1e-3, abs=1e-6)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(Workload, "descend", fail)
    alone, none = evaluator.evaluate_with_slopes(low, high)
    assert (alone.state, alone.kl, none) == ("ok", pytest.approx(score.kl, rel=1e-4), {})


def test_a_score_survives_a_row(loaded: LoadedModel) -> None:
    evaluator, store = evaluator_of(loaded)
    [score] = evaluator.evaluate([everywhere(store, 3)])
    again = Score.from_dict(score.to_dict())
    assert again.to_dict() == score.to_dict()
    assert again.kl == score.kl
    assert again.size == score.size


def test_a_schedule_is_measured_on_the_shard_of_its_digest_and_corrected_by_the_anchor(loaded: LoadedModel) -> None:
    evaluator, store = evaluator_of(loaded)
    evaluator.close()
    texts = ["One text to score.", "And quite another one, which is longer.", "A third; it ends here."]
    item = packed_item(loaded.encode, "Question: What?\nAnswer:", (" this", " that one"), 1)
    parts = [[item, packed_text(loaded.encode(text))] for text in texts]
    anchor = everywhere(store, 6)
    alone = [ModelEvaluator(loaded.model, store, [Workload(part, loaded.model)]) for part in parts]
    anchored = []
    for one in alone:
        anchored.append(one.evaluate([anchor])[0].kl)
        one.close()
    sharded = ModelEvaluator(loaded.model, store, [Workload(part, loaded.model) for part in parts], anchor)
    schedules = [everywhere(store, chi) for chi in range(1, 9)]
    scores = sharded.evaluate(schedules)
    sharded.close()
    assert len({score.shard for score in scores}) > 1
    for schedule, score in zip(schedules, scores, strict=True):
        assert score.shard == int(schedule.digest[:8], 16) % 3
        [raw] = alone[score.shard].evaluate([schedule])
        alone[score.shard].close()
        assert score.quality.kl == pytest.approx(raw.kl, abs=1e-6)
        assert score.kl == pytest.approx(raw.kl - anchored[score.shard] + sum(anchored) / 3, abs=1e-6)
    assert scores[5].kl == pytest.approx(sum(anchored) / 3)
    assert Score.from_dict(scores[0].to_dict()).kl == scores[0].kl


def test_several_workloads_need_an_anchor(loaded: LoadedModel) -> None:
    evaluator, store = evaluator_of(loaded)
    evaluator.close()
    workloads = [Workload([packed_text([1, 2, 3])], loaded.model) for _ in range(2)]
    with pytest.raises(ValueError, match="anchor"):
        ModelEvaluator(loaded.model, store, workloads)


def racing_evaluator(loaded: LoadedModel) -> tuple[ModelEvaluator, FactorStore]:
    evaluator, store = evaluator_of(loaded)
    evaluator.close()
    texts = [f"Text number {number} is about the {number * 7} things that one may count." for number in range(24)]
    workload = Workload(
        [packed_text(loaded.encode(text)) for text in texts], loaded.model, batch_tokens=300, mixed=True
    )
    return ModelEvaluator(loaded.model, store, [workload]), store


def test_a_clearly_worse_schedule_is_stopped_early_and_says_so(loaded: LoadedModel) -> None:
    evaluator, store = racing_evaluator(loaded)
    [best, worse] = evaluator.evaluate([everywhere(store, 10), everywhere(store, 1)])
    [raced] = evaluator.evaluate([everywhere(store, 1)], best)
    assert raced.state == raced.quality.state == "raced"
    assert 0 < raced.quality.tokens < worse.quality.tokens
    seen = [number for number, count in enumerate(raced.quality.tokens_by_sequence) if count]
    assert [raced.quality.kl_by_sequence[n] for n in seen] == [worse.quality.kl_by_sequence[n] for n in seen]
    assert Reward()(raced) == Reward().floor
    assert Score.from_dict(raced.to_dict()).quality.state != "ok"
    with pytest.raises(ValueError, match="numbers"):
        paired_kl(raced.quality, best.quality)


def test_the_better_schedule_survives_with_its_full_score(loaded: LoadedModel) -> None:
    evaluator, store = racing_evaluator(loaded)
    [best, worse] = evaluator.evaluate([everywhere(store, 10), everywhere(store, 1)])
    for schedule, rival in ((everywhere(store, 10), worse), (everywhere(store, 10), best)):
        [again] = evaluator.evaluate([schedule], rival)
        assert again.state == "ok"
        assert again.quality == best.quality


def test_a_rival_from_another_evaluator_or_without_numbers_is_refused(loaded: LoadedModel) -> None:
    evaluator, store = racing_evaluator(loaded)
    [best] = evaluator.evaluate([everywhere(store, 10)])
    counts = tuple(count + 1 for count in best.quality.tokens_by_sequence)
    for quality in (Quality(), dataclasses.replace(best.quality, tokens_by_sequence=counts)):
        with pytest.raises(ValueError, match="measured in full on the same workload"):
            evaluator.evaluate([everywhere(store, 1)], dataclasses.replace(best, quality=quality))


def test_a_repairing_evaluator_scores_the_repaired_model_and_leaves_it_dense(loaded: LoadedModel) -> None:
    before = copy.deepcopy(loaded.model.state_dict())
    asked = []

    def repair(schedule: Schedule) -> dict[str, torch.nn.Module]:
        asked.append(schedule)
        name = next(name for name, choice in schedule if not choice.is_dense)
        taken = {name: loaded.model.get_submodule(name)}
        loaded.model.set_submodule(name, copy.deepcopy(taken[name]))
        return taken

    evaluator, store = evaluator_of(loaded, repair=repair)
    low, dense = everywhere(store, 2), Schedule.dense(tuple(site.name for site in store.sites))
    scores = evaluator.evaluate([low, dense])
    # This repair is perfect: it puts the dense matrix back.
    assert [score.kl for score in scores] == pytest.approx([0, 0], abs=1e-5)
    assert [score.kept_fraction < 1 for score in scores] == [True, False]
    assert asked == [low]
    evaluator.close()
    after = loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_repair_that_fails_is_a_failed_score(loaded: LoadedModel) -> None:
    def repair(schedule: Schedule) -> dict[str, torch.nn.Module]:
        raise torch.linalg.LinAlgError("not positive definite")

    evaluator, store = evaluator_of(loaded, repair=repair)
    [score] = evaluator.evaluate([everywhere(store, 2)])
    assert (score.state, score.reason) == ("failed", "_LinAlgError: not positive definite")


def test_time_is_measured_only_when_asked_for_and_survives_writing(loaded: LoadedModel) -> None:
    evaluator, store = evaluator_of(loaded)
    [score] = evaluator.evaluate([everywhere(store, 2)])
    assert math.isnan(score.time_fraction)
    assert math.isnan(Score.from_dict(score.to_dict()).time_fraction)
    evaluator.close()
    evaluator, store = evaluator_of(loaded, times=lambda schedule: 0.75)
    [score] = evaluator.evaluate([everywhere(store, 2)])
    assert (
        Score.from_dict(score.to_dict()).time_fraction == score.time_fraction == evaluator.dense.time_fraction == 0.75
    )


def test_a_score_of_an_earlier_version_still_reads(loaded: LoadedModel) -> None:
    evaluator, store = evaluator_of(loaded)
    [score] = evaluator.evaluate([everywhere(store, 2)])
    row = {name: value for name, value in score.to_dict().items() if name != "time_fraction"}
    assert Score.from_dict(row).kl == score.kl

"""The evaluator over schedules with widths: states are not reused across widths, slopes of units, sizes, latency."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_bonds import Subject
from torch import nn

from compression import lagrangian, to_schedule
from compression.layers.planner import Planner
from compression.schedule import DENSE, Choice, Schedule
from compression.sites import Unit, units
from search.evaluation.evaluator import ModelEvaluator
from search.evaluation.latency import against_dense
from search.evaluation.packed_sequences import packed_text
from search.evaluation.prefix_reuse import prefix_keys
from search.evaluation.site_times import SiteTimes
from search.evaluation.workload import Workload

CPU = torch.device("cpu")
MODELS = ("random:tiny-llama", "random:tiny-gpt2")


def evaluator_of(subject: Subject, limit: int = 1 << 26, repairing: bool = False) -> ModelEvaluator:
    texts = [packed_text(tuple(range(start, start + 30))) for start in (0, 25, 60)]
    return ModelEvaluator(
        subject.model,
        subject.store,
        [Workload(texts, subject.model, 40)],
        reuse_bytes=limit,
        repair=subject.repair_ if repairing else None,
    )


def hidden(subject: Subject, *widths: int) -> Schedule:
    """The width of the MLP of every block, without factors; 0 leaves it dense."""
    choices = []
    for site in subject.sites:
        width = widths[site.block] if site.cuts and site.cuts[0].groups > 2 else 0
        choices.append((site.name, Choice("dense", 0, "none", (width,)) if width else DENSE))
    return Schedule(tuple(choices))


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_of_one_width_are_not_reused_for_another(name: str) -> None:
    walk = [(9, 9, 9), (20, 9, 9), (20, 9, 30), (0, 0, 9), (9, 9, 9)]
    scores = []
    for limit in (0, 1 << 26):
        subject = Subject.of(name)
        evaluator = evaluator_of(subject, limit)
        scores.append([one.quality for one in evaluator.evaluate([hidden(subject, *widths) for widths in walk])])
        evaluator.close()
    assert scores[0] == scores[1]
    assert len({quality.kl for quality in scores[0]}) == 4
    schedules = [hidden(subject, *widths) for widths in walk]
    keys = [prefix_keys(schedule, subject.sites, 3) for schedule in schedules]
    assert all(one[0] != two[0] for one, two in pairwise(keys[:2]))
    assert keys[1][:2] == keys[2][:2]
    assert keys[0] == keys[4]


def mixed(model: nn.Module, workload: Workload, around: nn.Module, other: nn.Module, share: float) -> float:
    """KL if the output of a module is moved by this share towards that of another one."""

    def mix(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        new = other(*args, **kwargs)
        if isinstance(output, tuple):
            return (torch.lerp(output[0], new[0], share), *output[1:])
        return torch.lerp(output, new, share)

    handle = around.register_forward_hook(mix, with_kwargs=True)
    try:
        kl = workload.measure(model).kl
    finally:
        handle.remove()
    assert kl is not None
    return kl


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", ["any", "plain", "small"])
def test_slopes_of_units_are_the_derivatives_of_kl_towards_their_other_choices(name: str, form: str) -> None:
    subject = Subject.of(name)
    menu = subject.store.menu(form=form)  # type: ignore[arg-type]
    now, toward = (to_schedule(menu, lagrangian(menu, int(kept * menu.dense_parameters))) for kept in (0.65, 0.85))
    evaluator = evaluator_of(subject)
    slopes = evaluator.slopes(now, toward)
    changed = [
        unit
        for unit in units(subject.sites)
        if any(now[site.name] != toward[site.name] for site in (unit.sites if isinstance(unit, Unit) else (unit,)))
    ]
    assert list(slopes) == [unit.name for unit in changed]
    assert any(isinstance(unit, Unit) for unit in changed)
    [workload] = evaluator._workloads
    for unit in changed[:: max(1, len(changed) // 3)]:
        other = evaluator._applier.replacement(unit, toward)
        around = subject.model.get_submodule(unit.name)
        above, below = (mixed(subject.model, workload, around, other, share) for share in (0.02, -0.02))
        assert slopes[unit.name] == pytest.approx((above - below) / 0.04, rel=0.05, abs=1e-5)
    evaluator.close()


def test_an_evaluator_that_repairs_scores_widths_lower_and_gives_the_dense_model_back() -> None:
    subject = Subject.of("random:tiny-llama")
    ids = subject.batches[0][0]
    dense = subject.model(input_ids=ids).logits
    scores = []
    for repairing in (False, True):
        evaluator = evaluator_of(subject, repairing=repairing)
        scores += evaluator.evaluate([subject.schedule(0.5)])
        evaluator.close()
    assert [score.state for score in scores] == ["ok", "ok"]
    assert scores[1].kl < scores[0].kl
    assert scores[1].size == scores[0].size
    assert torch.equal(subject.model(input_ids=ids).logits, dense)


def test_times_of_schedules_with_widths_are_estimated_and_measured() -> None:
    subject = Subject.of("random:tiny-llama")
    half, none = subject.schedule(0.5), subject.schedule(0, heads=False)
    times = SiteTimes(subject.sites, Planner("latency", None, measure=False), torch.float32, CPU)
    assert times(half) == pytest.approx(0.5)
    mlp = sum(site.parameters for site in subject.sites if site.cuts[0].groups > 2)
    assert times(none) == pytest.approx(1 - mlp / sum(site.parameters for site in subject.sites))
    assert times(subject.schedule(0.5, 2)) > 0
    menu = subject.store.menu()
    schedule = to_schedule(menu, lagrangian(menu, menu.dense_parameters // 2))
    shares = [times.shares(options) for options in menu.sites]
    assert sum(float(each[-1]) for each in shares) == pytest.approx(1)
    dense = subject.model(input_ids=subject.batches[0][0]).logits
    found = against_dense(subject.model, subject.store, {"half": half, "none": none, "mixed": schedule}, "memory", None)
    assert list(found) == ["half", "none", "mixed"]
    assert all(math.isfinite(one.prefill_ratio) and one.decode_ratio > 0 for one in found.values())
    assert torch.equal(subject.model(input_ids=subject.batches[0][0]).logits, dense)
    schedules = {"half": half, "none": none, "mixed": schedule}
    others = against_dense(subject.model, subject.store, schedules, "memory", None, stand_ins=True)
    for name, one in found.items():  # the same shapes, without the numbers of the rows and columns that are left
        assert others[name].stored_bytes == pytest.approx(one.stored_bytes, rel=0.02)
    assert all(math.isfinite(one.prefill_ratio) and one.decode_ratio > 0 for one in others.values())
    assert torch.equal(subject.model(input_ids=subject.batches[0][0]).logits, dense)

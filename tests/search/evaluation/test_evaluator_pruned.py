"""The evaluator over schedules with pruned matrices, against a model that has these matrices as its weights."""

from __future__ import annotations

import pytest
import torch
from tiny_bonds import Subject

from compression.decomposition.pruned_store import ladder
from compression.schedule import DENSE, SPARSE, Choice, Schedule
from compression.sites import dense_weight
from search.evaluation.evaluator import ModelEvaluator
from search.evaluation.packed_sequences import packed_text
from search.evaluation.workload import Workload

TEXTS = [packed_text(tuple(range(start, start + 30))) for start in (0, 25, 60)]


@pytest.mark.parametrize("packed", [False, True])
def test_a_score_is_that_of_the_model_with_pruned_weights_whatever_was_scored_before(packed: bool) -> None:
    subject, twin = Subject.of("random:tiny-llama"), Subject.of("random:tiny-llama").model
    places = {"a": (2, 5, 8), "b": (2, 5, None), "c": (2, 5, 8)}  # on the ladders of the sites of every block
    schedules = {}
    for key, of_blocks in places.items():
        choices = []
        for site in subject.sites:
            place = of_blocks[site.block]
            choices.append((site.name, DENSE if place is None else Choice(SPARSE, ladder(site)[place], "two-sided")))
        schedules[key] = Schedule(tuple(choices))
    workload = Workload(TEXTS, twin, 40)
    workload.reference(twin)
    evaluator = ModelEvaluator(subject.model, subject.store, [Workload(TEXTS, subject.model, 40)], packed=packed)
    scores = dict(zip(schedules, evaluator.evaluate(list(schedules.values())), strict=True))
    evaluator.close()
    original = {site.name: dense_weight(twin.get_submodule(site.name)).clone() for site in subject.sites}
    for key, schedule in schedules.items():
        with torch.no_grad():
            for name, choice in schedule:
                matrix = subject.store.pruned.pruned(name, choice.chi).matrix if choice.is_sparse else original[name]
                dense_weight(twin.get_submodule(name)).copy_(matrix)
        assert scores[key].kl == pytest.approx(workload.measure(twin).kl, rel=1e-5)
    assert scores["a"].kl == scores["c"].kl > scores["b"].kl > 0
    assert scores["a"].size.parameters < scores["b"].size.parameters

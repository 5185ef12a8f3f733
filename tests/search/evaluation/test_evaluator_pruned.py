"""The evaluator over schedules with pruned and rounded matrices, against a model that has them as its weights."""

from __future__ import annotations

import pytest
import torch
from tiny_bonds import Subject

from compression.decomposition.entry_store import ladder
from compression.schedule import DENSE, SPARSE, Choice, Schedule
from compression.sites import dense_weight
from search.evaluation.evaluator import ModelEvaluator
from search.evaluation.packed_sequences import packed_text
from search.evaluation.workload import Workload

TEXTS = [packed_text(tuple(range(start, start + 30))) for start in (0, 25, 60)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bits", [0, 4])
def test_a_score_is_that_of_the_model_with_small_weights_whatever_was_scored_before(packed: bool, bits: int) -> None:
    subject, twin = Subject.of("random:tiny-llama"), Subject.of("random:tiny-llama").model
    places = {"a": (2, 5, 8), "b": (2, 5, None), "c": (2, 5, 8)}  # on the ladders of the sites of every block
    schedules = {}
    for key, of_blocks in places.items():
        choices = []
        for site in subject.sites:
            place = of_blocks[site.block]
            pruned = Choice(SPARSE, ladder(site)[place or 0], "two-sided")
            rounded = Choice("dense", 0, "two-sided", bits=(bits or 4) - (place or 0) // 5)
            choices.append((site.name, DENSE if place is None else rounded if bits else pruned))
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
                small = choice.keeps_entries
                matrix = subject.store.entries.entries(name, choice).matrix if small else original[name]
                dense_weight(twin.get_submodule(name)).copy_(matrix)
        assert scores[key].kl == pytest.approx(workload.measure(twin).kl, rel=1e-5)
    assert scores["a"].kl == scores["c"].kl > scores["b"].kl > 0
    assert scores["a"].size.bytes < scores["b"].size.bytes

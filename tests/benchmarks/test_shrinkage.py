"""The benchmark of shrinkages: costs on moments that a decomposition has not seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.shrinkage import SHRINKAGE, SIDES, against, held_out_costs, measure, report, trials, weighted
from compression.numerics.whitening import Whitening
from compression.sites import discover_sites
from search.model.loading import load_model


def moment(size: int, rows: int, seed: int) -> torch.Tensor:
    samples = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    return samples.T @ samples / rows


def test_cost_in_the_own_moments_is_the_discarded_tail_of_the_spectrum() -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    own = moment(8, 50, 1), moment(6, 50, 2)
    white = Whitening.of(*own, 1e-9).apply(weight)
    tail = 0.5 * float(torch.linalg.svdvals(white)[3:].square().sum())
    [[cost]] = held_out_costs(weight, own, own, [(1e-9, 1e-9)], [3])
    assert cost == pytest.approx(tail, rel=1e-4)


def test_moments_of_few_tokens_want_more_shrinkage() -> None:
    weight = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    truth = torch.eye(24), torch.eye(24)
    few = moment(24, 12, 1), moment(24, 12, 2)
    costs = held_out_costs(weight, few, truth, [(1e-3, 1e-3), (0.1, 0.1), (1.0, 1.0)], [8])[:, 0]
    assert costs[0] > costs[1] > costs[2]


def test_difference_is_paired_over_sites() -> None:
    reference = np.array([1.0, 10.0, 100.0])
    ratio, error = against(1.1 * reference, reference)
    assert ratio == pytest.approx(1.1)
    assert 0 < error < 0.2
    assert against(reference, reference) == (1.0, 0.0)


def test_a_side_alone_leaves_the_other_at_the_constant() -> None:
    tried = trials(SIDES)
    assert tried["input", 0.1] == (0.1, SHRINKAGE)
    assert tried["output", 0.1] == (SHRINKAGE, 0.1)
    assert {tried[side, SHRINKAGE] for side in SIDES} == {(SHRINKAGE, SHRINKAGE)}


def test_report_names_the_best_value_of_every_column() -> None:
    costs = {key: np.full((3, 2), 2.0 - (key[1] == 0.03)) for key in trials(SIDES)}
    body, bars = report({"half": [costs, costs], "quarter": []})
    assert body.count("0.03 is best, -50.0%") == 2 * len(SIDES)
    assert all(bar.value == 0.5 for bar in bars)


def test_every_site_and_kept_fraction_of_a_model_has_a_cost() -> None:
    model = load_model("random:tiny-gpt2", torch.device("cpu"), torch.float32).model
    sites = [site for site in discover_sites(model) if not site.dense_because]
    ids = torch.randint(0, 100, (4, 16), generator=torch.Generator().manual_seed(0))
    batches = [(ids[rows], torch.ones_like(ids[rows], dtype=torch.bool)) for rows in (slice(0, 2), slice(2, 4))]
    known, unknown = (weighted(model, sites, [batch], 0) for batch in batches)
    costs = measure(model, sites, known, unknown, ("both",))
    assert set(costs) == set(trials(("both",)))
    assert all(cost.shape == (len(sites), 2) and (cost > 0).all() for cost in costs.values())

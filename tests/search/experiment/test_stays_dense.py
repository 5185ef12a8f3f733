"""What stays dense is said with its reasons and its share of the parameters."""

from __future__ import annotations

import pytest
import torch

from compression.sites import Site
from search.config import Config
from search.experiment.open_model import open_model, staying_dense


def test_reasons_are_given_with_their_share_of_the_parameters_largest_first() -> None:
    router = [Site(f"layers.{block}.gate", block, "gate", 4, 5, "chooses among 4 experts") for block in (0, 1)]
    fused = Site("layers.0.experts.up", 0, "up", 30, 2, "3 matrices are fused in one tensor")
    sites = [router[0], fused, Site("layers.0.q", 0, "q", 10, 10), router[1]]
    assert staying_dense(sites) == (
        "30.0% of the parameters, such as layers.0.experts.up (3 matrices are fused in one tensor), and "
        "20.0% of the parameters, such as layers.0.gate (chooses among 4 experts)"
    )
    assert staying_dense(sites[2:3]) == ""


def test_a_target_that_fused_experts_put_out_of_reach_is_refused_with_their_share() -> None:
    values = {"model": "random:tiny-qwen3-moe", "device": "cpu", "target_kept": 0.5, "form": "factors"}
    with pytest.raises(ValueError, match=r"what stays dense is .*% of the parameters, such as .*fused in one tensor"):
        open_model(Config.of({**values, "experts": "fused"}), torch.device("cpu"))
    open_model(Config.of(values), torch.device("cpu"))


def test_stacked_experts_of_too_many_hidden_units_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.experiment.open_model._LARGEST_STACK", 95)
    values = {"model": "random:tiny-qwen3-moe", "device": "cpu", "experts": "shared", "form": "factors"}
    with pytest.raises(ValueError, match=r"at most 95 hidden units .* has 96; use experts single"):
        open_model(Config.of(values), torch.device("cpu"))

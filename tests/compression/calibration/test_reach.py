"""What a model does not use as a plain linear map stays dense, with the reason; the rest is as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from odd_models import Q, Sub, model
from torch import nn

from benchmarks.zoo_models import make_model
from compression.calibration.reach import with_reach
from compression.sites import discover_sites


class Router(nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(x), x


class Normed(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(x))


CASES: dict[str, tuple[Callable[[nn.Module, torch.Tensor], torch.Tensor], str]] = {
    "as usual": (lambda inner, x: inner(x), ""),
    "flattened tokens": (lambda inner, x: inner(x.flatten(0, 1)).view_as(x), ""),
    "weight only": (lambda inner, x: x @ inner.weight.T, "its weight is used without a call of its module"),
    "some tokens": (lambda inner, x: inner(x[:, :1]).expand_as(x), "does not read one row for each token"),
    "twice": (lambda inner, x: inner(inner(x)), "runs 2 times in a pass"),
    "unread": (lambda inner, x: x + 0 * inner(x).detach(), "the prediction does not depend on it"),
    "by keyword": (lambda inner, x: inner(input=x), "reads more than one tensor"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_matrix_that_is_not_used_as_a_linear_map_says_why_it_stays_dense(case: str) -> None:
    call, reason = CASES[case]
    dense = model(q_proj=Sub(call)).requires_grad_(False)
    found = {site.name: site.dense_because for site in with_reach(dense, discover_sites(dense))}
    assert found.pop(f"{Q}.inner") == reason
    assert set(found.values()) == {""}


@pytest.mark.parametrize(
    ("layer", "reason"), [(Router, "gives more than one tensor"), (Normed, "more than the product with its weight")]
)
def test_a_linear_layer_with_an_output_of_its_own_stays_dense(layer: type[nn.Linear], reason: str) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer(12, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = self.inner(x)
            return found[0] if isinstance(found, tuple) else found

    dense = model(q_proj=Around()).requires_grad_(False)
    [site] = [site for site in with_reach(dense, discover_sites(dense)) if site.dense_because]
    assert site.name == f"{Q}.inner"
    assert reason in site.dense_because


def test_a_model_that_is_all_linear_maps_keeps_its_sites() -> None:
    dense = make_model("llama").bfloat16()
    sites = discover_sites(dense)
    assert with_reach(dense, sites) == sites
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in dense.parameters())


def test_a_router_and_a_gate_have_different_families_and_only_roles_lose_their_ending() -> None:
    families = {site.name.split(".", 3)[3]: site.family for site in discover_sites(make_model("qwen2_moe"))}
    assert families["mlp.gate"] == "mlp.gate"
    assert families["mlp.shared_expert.gate_proj"] == "mlp.shared_expert.gate_proj"
    assert families["self_attn.q_proj"] == "q"
    starcoder = {site.family for site in discover_sites(make_model("starcoder2"))}
    assert starcoder == {"q", "k", "v", "o", "c_fc", "c_proj"}


def test_a_matrix_far_smaller_than_the_others_of_its_block_stays_dense() -> None:
    sites = discover_sites(make_model("gemma3n_text"))
    small = {site.name.rpartition(".")[2] for site in sites if site.dense_because == "4 × 4 is too small to matter"}
    assert small == {"correction_coefs"}

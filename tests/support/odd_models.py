"""Small models with weights, shapes and layers that a decomposition cannot take as they come."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from tiny_model import Conv1D
from torch import nn

from compression import (
    FactorCache,
    FactorStore,
    Menu,
    MPOLinear,
    ScheduleApplier,
    Statistics,
    collect,
    decompose,
    dense_weight,
    discover_sites,
    lagrangian,
    model_parameters,
    resolve,
    to_schedule,
    uniform_schedule,
)
from compression.size import SizeModel

Q = "layers.1.q_proj"


VOCABULARY = 17


class Block(nn.Module):
    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.q_proj: nn.Module = nn.Linear(width, width, bias=False)
        self.up, self.down = Conv1D(wide, width), nn.Linear(wide, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(self.q_proj(x))
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, width: int = 12, wide: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Block(width, wide) for _ in range(2))
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.lm_head(x))


def model(width: int = 12, wide: int = 24, q_proj: nn.Module | None = None) -> Model:
    torch.manual_seed(0)
    made = Model(width, wide)
    if q_proj is not None:
        made.set_submodule(Q, q_proj)
    return made.eval().requires_grad_(False)


def batches(vocabulary: int = VOCABULARY) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids = torch.randint(vocabulary, (4, 40), generator=torch.Generator().manual_seed(1))
    return [(ids, torch.ones_like(ids, dtype=torch.bool))]


def statistics_of(dense: nn.Module, vocabulary: int = VOCABULARY) -> Statistics:
    return collect(dense, discover_sites(dense), batches(vocabulary), torch.Generator().manual_seed(2))


def store_of(dense: nn.Module, vocabulary: int = VOCABULARY) -> FactorStore:
    sites = discover_sites(dense)
    weights = {site.name: dense_weight(dense.get_submodule(site.name)) for site in sites if not site.dense_because}
    statistics = statistics_of(dense, vocabulary)
    return FactorStore(sites, weights, lambda: statistics, "key", 0.003, FactorCache(None))


def survives(dense: nn.Module, kept: float = 0.7, vocabulary: int = VOCABULARY) -> Menu:
    """Discover, calibrate, decompose, allocate, apply, run, restore; what must hold for every model taken."""
    store = store_of(dense, vocabulary)
    menu = store.menu()
    target = int(kept * menu.dense_parameters)
    ids = batches(vocabulary)[0][0]
    before = dense(input_ids=ids).logits
    sizes = SizeModel(dense, store.sites)
    with ScheduleApplier(dense, store, packed=True) as applier:
        for schedule in (
            to_schedule(menu, lagrangian(menu, target)),
            uniform_schedule(store.sites, "lowrank", "input", target),
            uniform_schedule(store.sites, "lowrank", "plain", target),
            uniform_schedule(store.sites, "mpo2", "plain", menu.dense_parameters),
        ):
            applier.apply_(schedule)
            logits = dense(input_ids=ids).logits
            assert torch.isfinite(logits).all()
            assert logits.dtype == before.dtype
            assert model_parameters(dense) == sizes.size(schedule).parameters
            assert all(parameter.dtype == before.dtype for parameter in dense.parameters())
    assert torch.equal(dense(input_ids=ids).logits, before)
    return menu


def reasons(dense: nn.Module) -> dict[str, str]:
    return {site.name: site.dense_because for site in discover_sites(dense) if site.dense_because}


class Sub(nn.Module):
    """A linear map called in some way of its own."""

    def __init__(self, call: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.inner, x)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(12, 1), nn.Linear(1, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))


class Plain(nn.Module):
    """A matrix of a class of its own; the type of its entries as wanted."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.to(x.dtype)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 12, 12) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("eij,btj->bti", self.gate_up_proj, x)


def shared_weight() -> Model:
    dense = model()
    dense.get_submodule(Q).weight = dense.get_submodule("layers.0.q_proj").weight
    return dense


def shared_module() -> Model:
    dense = model()
    dense.set_submodule(Q, dense.get_submodule("layers.0.q_proj"))
    return dense


STAYING: dict[str, tuple[Callable[[], Model], dict[str, str]]] = {
    "1-wide": (
        lambda: model(q_proj=Gate()),
        {f"{Q}.down": "1 × 12 is too small to factor", f"{Q}.up": "12 × 1 is too small to factor"},
    ),
    "weight": (shared_weight, {"layers.0.q_proj": f"shared by layers.0.q_proj and {Q}"}),
    "module": (shared_module, {"layers.0.q_proj": f"shared by layers.0.q_proj and {Q}"}),
    "class": (lambda: model(q_proj=Plain(torch.eye(12))), {Q: "not the weight of a linear map"}),
    "experts": (
        lambda: model(q_proj=Experts()),
        {f"{Q}.gate_up_proj": "3 matrices are fused in one tensor"},
    ),
}


def meta(dense: Model) -> None:
    dense.get_submodule(Q).to("meta")


def empty(dense: Model) -> None:
    dense.get_submodule(Q).weight = nn.Parameter(torch.empty(0, 12))


def parametrized(dense: Model) -> None:
    nn.utils.parametrizations.weight_norm(dense.get_submodule(Q))


def packed(dense: Model) -> None:
    layer = nn.Module()
    layer.in_features = layer.out_features = 12
    layer.scale, layer.packed = nn.Parameter(torch.ones(12, 1)), torch.zeros(12, 6, dtype=torch.uint8)
    dense.set_submodule(Q, layer)


def tensorized(dense: Model) -> None:
    dense.set_submodule(Q, MPOLinear(decompose(dense.get_submodule(Q).weight, resolve("mpo2", 12, 12))[0]))

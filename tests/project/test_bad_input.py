"""Weights, shapes and statistics that a decomposition cannot take as they come: handled, or refused by name."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from tiny_model import Conv1D
from torch import nn

from compression import (
    DENSE,
    Choice,
    FactorCache,
    FactorStore,
    Menu,
    MPOLinear,
    Schedule,
    ScheduleApplier,
    Site,
    Statistics,
    Whitening,
    collect,
    contract,
    decompose,
    dense_weight,
    discover_sites,
    lagrangian,
    model_parameters,
    resolve,
    shrink,
    to_schedule,
    uniform_schedule,
)
from compression.size import SizeModel
from envs import Problem
from search.model.loading import load_model

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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [Q, "layers.0.up"])
def test_a_weight_that_is_not_finite_is_refused_by_name(name: str, value: float) -> None:
    dense = model()
    dense.get_submodule(name).weight[1, 2] = value
    with pytest.raises(ValueError, match=f"site {name}: the weight has NaN or infinite"):
        discover_sites(dense)


def test_a_zero_weight_costs_nothing_at_any_chi_and_stays_zero() -> None:
    dense = model()
    dense.get_submodule(Q).weight.zero_()
    menu = survives(dense)
    [options] = [options for options in menu.sites if options.site.name == Q]
    assert (options.cost == 0).all()
    assert lagrangian(menu, menu.dense_parameters - 1)[menu.sites.index(options)] == 0
    assert not contract(store_of(dense).cores(Q, options.choices[0])).any()


def test_a_site_whose_output_is_ignored_costs_next_to_nothing() -> None:
    dense = model()
    dense.get_submodule("layers.0.down").weight.zero_()
    statistics = statistics_of(dense)
    assert not statistics.gradient("layers.0.up").any()
    menu = survives(dense)
    cost = {options.site.name: options.cost.max() for options in menu.sites}
    assert cost["layers.0.up"] < 1e-12 * cost["layers.1.up"]
    chosen = to_schedule(menu, lagrangian(menu, menu.dense_parameters // 2))
    assert 1 <= chosen["layers.0.up"].chi < chosen["layers.1.up"].chi


def test_a_model_of_zeros_survives() -> None:
    dense = model()
    for site in discover_sites(dense):
        dense.get_submodule(site.name).weight.zero_()
    menu = survives(dense)
    assert all(choice.chi == 1 for _, choice in to_schedule(menu, lagrangian(menu, menu.dense_parameters)))


def test_a_dead_site_survives_in_float16() -> None:
    dense = model()
    dense.get_submodule("layers.0.down").weight.zero_()
    survives(dense.to(torch.float16))


@pytest.mark.parametrize("scale", [1e-30, 1e-42, 1e15])
def test_weights_of_extreme_size_survive(scale: float) -> None:
    dense = model()
    dense.get_submodule(Q).weight.mul_(scale)
    survives(dense)


def test_a_rank_deficient_weight_is_exact_at_its_rank() -> None:
    dense = model()
    weight = torch.outer(torch.arange(1.0, 13), torch.arange(-5.0, 7)) * 0.01
    dense.get_submodule(Q).weight.copy_(weight)
    survives(dense)
    assert torch.allclose(contract(store_of(dense).cores(Q, Choice("lowrank", 1, "two-sided"))), weight, atol=1e-6)


def test_input_that_spans_one_direction_or_none_survives() -> None:
    for rows in (torch.ones(VOCABULARY, 12), torch.zeros(VOCABULARY, 12)):
        dense = model()
        dense.embedding.weight.copy_(rows)
        survives(dense)


@pytest.mark.parametrize("shrinkage", [1e-12, 0.003, 1.0])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_moments_of_any_rank_have_a_whitening_that_undoes_itself(scale: float, shrinkage: float) -> None:
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * scale**0.5
    moment = rows.T @ rows / 3
    rounded = moment - torch.diag(moment.diagonal() * 8 * torch.finfo(torch.float32).eps)
    assert torch.linalg.eigvalsh(rounded.double())[0] < 0
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for side in (moment, rounded, torch.zeros(64, 64)):
        whitening = Whitening.of(side, side, shrinkage)
        assert torch.isfinite(whitening.apply(weight).float()).all()
        undone = whitening.undo_right(whitening.undo_left(whitening.apply(weight)))
        assert torch.allclose(undone, weight, rtol=1e-6, atol=1e-6)


def test_shrinking_keeps_the_trace_of_an_ordinary_moment() -> None:
    rows = torch.randn(100, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = rows.T @ rows
    assert shrink(moment, 0.1).trace().item() == pytest.approx(moment.trace().item())
    assert torch.allclose(shrink(moment, 1.0), torch.eye(8, dtype=torch.float64) * moment.trace() / 8)


def test_a_moment_that_is_none_is_refused() -> None:
    moment = torch.eye(3)
    moment[0, 2] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        shrink(moment, 0.1)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        shrink(torch.diag(torch.tensor([2.0, -1.0])), 0.1)


def test_statistics_that_are_not_finite_or_missing_are_refused_by_name() -> None:
    broken = torch.eye(4)
    broken[1, 2] = math.inf
    statistics = Statistics({"b": broken}, {"a": "a", "b": "a"}, {"a": torch.eye(4), "b": broken}, 10)
    assert statistics.gradient("a").shape == (4, 4)
    with pytest.raises(ValueError, match="site b: the second moment of its inputs has NaN or infinite"):
        statistics.input("b")
    with pytest.raises(ValueError, match="site b: the second moment of its gradients has NaN or infinite"):
        statistics.gradient("b")
    for ask in (statistics.input, statistics.gradient):
        with pytest.raises(ValueError, match="site c: no second moment"):
            ask("c")


def test_activations_that_overflow_are_refused_at_the_first_site_they_reach() -> None:
    dense = model()
    dense.get_submodule("layers.0.down").bias.fill_(math.nan)
    with pytest.raises(ValueError, match=f"site {Q}: the second moment of its inputs"):
        statistics_of(dense)


class Sub(nn.Module):
    """A linear map called in some way of its own."""

    def __init__(self, call: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.inner, x)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda inner, x: x, "never reached by the calibration text"),
        (lambda inner, x: inner(x.detach()), "no gradient of the prediction reaches it"),
        (lambda inner, x: x + 0 * inner(x).detach(), "no gradient of the prediction reaches it"),
        (
            lambda inner, x: inner(x.flatten(0, 1)[:7]).sum() + x,
            r"one row per token to be calibrated, reads shape \(7, 12\)",
        ),
        (lambda inner, x: inner(input=x), "one row per token to be calibrated, reads a keyword argument"),
    ],
)
def test_a_linear_map_that_cannot_be_calibrated_is_refused_by_name(
    call: Callable[[nn.Module, torch.Tensor], torch.Tensor], reason: str
) -> None:
    with pytest.raises(ValueError, match=rf"site {Q}\.inner: .*{reason}"):
        statistics_of(model(q_proj=Sub(call)))


def test_rows_that_arrive_flattened_count_as_tokens_with_their_mask() -> None:
    flat = model(q_proj=Sub(lambda inner, x: inner(x.flatten(0, 1)).reshape(x.shape)))
    plain = model(q_proj=Sub(lambda inner, x: inner(x)))
    [(ids, mask)] = batches()
    mask[:, 30:] = False
    seen = [
        collect(dense, discover_sites(dense), [(ids, mask)], torch.Generator().manual_seed(2))
        for dense in (flat, plain)
    ]
    assert torch.equal(seen[0].input(f"{Q}.inner"), seen[1].input(f"{Q}.inner"))
    assert torch.equal(seen[0].gradient(f"{Q}.inner"), seen[1].gradient(f"{Q}.inner"))


@pytest.mark.parametrize(("width", "wide"), [(13, 17), (15, 21), (12, 13), (3, 5)])
def test_prime_and_odd_dimensions_survive(width: int, wide: int) -> None:
    dense = model(width, wide)
    survives(dense, 0.9)
    assert not reasons(dense)


def test_an_mpo_of_prime_dimensions_is_refused_by_name_and_left_dense_by_a_uniform_schedule() -> None:
    dense = model(13, 17)
    store = store_of(dense)
    with pytest.raises(ValueError, match=f"site {Q}: no χ of mpo2 makes a matrix of 13 × 13 smaller"):
        store.cores(Q, Choice("mpo2", 1, "plain"))
    total = sum(site.parameters for site in store.sites)
    assert uniform_schedule(store.sites, "mpo2", "plain", total)[Q].is_dense
    with pytest.raises(ValueError, match="cannot be met"):
        uniform_schedule(store.sites, "mpo2", "plain", total // 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_survive_and_keep_their_type(dtype: torch.dtype) -> None:
    survives(model().to(dtype))


def test_a_transposed_weight_is_tensorized_as_the_matrix_it_means() -> None:
    dense = model()
    x, name = torch.randn(5, 12), "layers.0.up"
    store = store_of(dense)
    dense.get_submodule("layers.0.up").weight.copy_(contract(store.cores(name, Choice("lowrank", 3, "input"))).T)
    expected = dense.get_submodule(name)(x)
    choices = dict(Schedule.dense(tuple(site.name for site in store.sites))) | {name: Choice("lowrank", 3, "input")}
    with ScheduleApplier(dense, store, packed=True) as applier:
        applier.apply_(Schedule(tuple(choices.items())))
        assert isinstance(dense.get_submodule(name), MPOLinear)
        assert torch.allclose(dense.get_submodule(name)(x), expected, atol=1e-5)
    assert isinstance(dense.get_submodule(name), Conv1D)


@pytest.mark.parametrize("name", ["random:tiny-llama", "random:tiny-gpt2", "random:tiny-qwen2"])
def test_the_models_of_transformers_have_no_site_that_stays_dense(name: str) -> None:
    dense = load_model(name, "cpu").model
    assert not reasons(dense)
    survives(dense, vocabulary=257)


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
    "experts": (lambda: model(q_proj=Experts()), {f"{Q}.gate_up_proj": "not the weight of a linear map"}),
}


@pytest.mark.parametrize("kind", STAYING)
def test_a_site_that_stays_dense_says_why_counts_and_is_not_calibrated(kind: str) -> None:
    make, expected = STAYING[kind]
    dense = make()
    assert reasons(dense) == expected
    matrices = [value for name, value in dense.named_parameters() if name.startswith("layers") and value.ndim > 1]
    assert sum(site.parameters for site in discover_sites(dense)) == sum(value.numel() for value in matrices)
    assert not statistics_of(dense).gradients.keys() & expected.keys()


@pytest.mark.parametrize("kind", STAYING)
def test_a_model_with_a_site_that_stays_dense_is_tensorized_around_it(kind: str) -> None:
    make, expected = STAYING[kind]
    dense = make()
    menu = survives(dense)
    assert menu.dense_parameters == sum(site.parameters for site in discover_sites(dense))
    for options in menu.sites:
        assert (options.choices == (DENSE,)) == (options.site.name in expected)
    name, reason = next(iter(expected.items()))
    store = store_of(dense)
    choices = dict(Schedule.dense(tuple(site.name for site in store.sites))) | {name: Choice("lowrank", 1, "plain")}
    with pytest.raises(ValueError, match=f"site {name} must stay dense: {reason}"):
        ScheduleApplier(dense, store).apply_(Schedule(tuple(choices.items())))
    steps = Problem.build(menu, 0.7, "site").groups
    assert {menu.sites[index].site.name for group in steps for index in group.sites}.isdisjoint(expected)
    assert sum(len(group.sites) for group in steps) == len(menu.sites) - len(expected)


def test_a_menu_in_which_everything_stays_dense_is_no_problem_to_solve() -> None:
    dense = model(1, 1)
    menu = store_of(dense).menu()
    assert to_schedule(menu, lagrangian(menu, menu.dense_parameters)) == Schedule.dense(tuple(reasons(dense)))
    with pytest.raises(ValueError, match="no site with an option besides dense"):
        Problem.build(menu, 1.0)


def test_a_weight_shared_with_the_embedding_stays_dense() -> None:
    dense = model(VOCABULARY)
    dense.get_submodule(Q).weight = dense.embedding.weight
    assert reasons(dense) == {Q: f"shared by embedding and {Q}"}


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


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (meta, "meta device"),
        (empty, r"empty, of shape \(0, 12\)"),
        (parametrized, "computed; remove its parametrization"),
        (packed, "a Module holds no matrix of its shape"),
        (tensorized, "a MPOLinear holds no matrix of its shape"),
    ],
)
def test_a_matrix_without_values_to_decompose_is_refused_by_name(spoil: Callable[[Model], None], reason: str) -> None:
    dense = model()
    spoil(dense)
    with pytest.raises(ValueError, match=f"site {Q}: .*{reason}"):
        discover_sites(dense)


def test_shapes_alone_will_do_for_a_model_without_values() -> None:
    dense = model()
    sites = discover_sites(dense)
    with pytest.raises(ValueError, match=r"site layers\.0\.q_proj: .*meta device"):
        discover_sites(dense.to("meta"))
    assert discover_sites(dense.to("meta"), shapes_only=True) == sites


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn", "complex64"])
@pytest.mark.parametrize("own_class", [False, True])
def test_quantized_and_complex_weights_are_refused_by_name(dtype: str, own_class: bool) -> None:
    values = torch.zeros(12, 12).to(getattr(torch, dtype))
    dense = model(q_proj=Plain(values) if own_class else None)
    dense.get_submodule(Q).weight = nn.Parameter(values, requires_grad=False)
    with pytest.raises(ValueError, match=f"site {Q}: the weight must be one of float32, .*, got {dtype}"):
        discover_sites(dense)


def test_the_blocks_are_those_that_hold_most_not_a_longer_list_inside_one() -> None:
    dense = model()
    dense.layers[0].add_module("experts", nn.ModuleList(nn.Linear(4, 4) for _ in range(9)))
    assert {site.block for site in discover_sites(dense)} == {0, 1}
    assert Site("layers.0.experts.3", 0, "experts", 4, 4) in discover_sites(dense)

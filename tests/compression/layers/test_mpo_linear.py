"""Every route of an MPO layer is the same map, stores what its topology says, and is never stale."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import nn

from compression import (
    Choice,
    FactorCache,
    FactorStore,
    Schedule,
    ScheduleApplier,
    Statistics,
    dense_weight,
    discover_sites,
    model_parameters,
)
from compression.layers.mpo_linear import MPOLinear
from compression.layers.planner import Planner
from compression.layers.routes import Plan, Route, extra_entries, formed_quickly, in_training, routes
from compression.numerics.cores import contract, decompose, truncate
from compression.numerics.gauge import PivotedCore, pivot, stored
from compression.numerics.legs import resolve
from compression.numerics.pivoted_product import _buffer, pivoted_product, row_order, unfolding
from compression.size import SizeModel

OUT, IN, CHI = 24, 36, 7
TOPOLOGIES = ("lowrank", "pivoted-lowrank", "mpo2", "pivoted-mpo2", "mpo3", "pivoted-mpo3")
CASES = [(topology, route) for topology in TOPOLOGIES for route in routes(resolve(topology, OUT, IN))]
Change = Callable[[MPOLinear], None]


def layer_of(topology: str, seed: int = 0, dtype: torch.dtype = torch.float32, bias: bool = True) -> MPOLinear:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(OUT, IN, generator=generator)
    plain = [core.contiguous() for core in truncate(decompose(matrix, resolve(topology, OUT, IN))[0], CHI)]
    cores: list[torch.Tensor | PivotedCore] = list(plain)
    if topology.startswith("pivoted-"):
        pivoted, last = pivot(plain)
        cores = [*pivoted, last]
    return MPOLinear(cores, torch.randn(OUT, generator=generator) if bias else None).to(dtype)


def always(route: Route) -> Plan:
    return Plan(((1, route),))


def expected(layer: MPOLinear, x: torch.Tensor) -> torch.Tensor:
    return x @ contract(layer.cores).T + (0 if layer.bias is None else layer.bias)


@pytest.mark.parametrize(("topology", "route"), CASES)
@pytest.mark.parametrize("shape", [(0,), (), (2, 3), (3, 345)], ids=str)
def test_every_route_is_the_contracted_matrix_with_bias(topology: str, route: Route, shape: tuple[int, ...]) -> None:
    layer = layer_of(topology)
    x = torch.randn(*shape, IN, generator=torch.Generator().manual_seed(1))
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            y = layer.run(x, route)
        assert y.shape == (*shape, OUT)
        assert y.is_contiguous()
        torch.testing.assert_close(y, expected(layer, x), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("topology", "route"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_and_close(topology: str, route: Route, dtype: torch.dtype) -> None:
    layer = layer_of(topology).to(dtype)
    x = torch.randn(50, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        y = layer.run(x, route)
    assert y.dtype == dtype
    reference = expected(copy.deepcopy(layer).double(), x.double())
    assert (y.double() - reference).norm() <= 0.03 * reference.norm()


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_stored_are_the_parameters_of_the_topology_and_int32_places_and_nothing_else(topology: str) -> None:
    layer, legs = layer_of(topology, bias=False), resolve(topology, OUT, IN)
    assert layer.legs == legs
    assert sum(parameter.numel() for parameter in layer.parameters()) == legs.parameters(CHI)
    buffers = list(layer.buffers())
    assert sum(buffer.numel() for buffer in buffers) == legs.index_entries(CHI)
    assert all(buffer.dtype == torch.int32 for buffer in buffers)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in layer.state_dict().values())
    assert stored == 4 * (legs.parameters(CHI) + legs.index_entries(CHI))


def test_tails_in_any_order_of_rows_are_stored_in_one() -> None:
    layer = layer_of("pivoted-lowrank", bias=False)
    order = torch.randperm(OUT, generator=torch.Generator().manual_seed(4))
    core = PivotedCore(torch.randn(OUT - CHI, CHI), order, (1, OUT, 1, CHI))
    last = layer.cores[1].detach()
    torch.testing.assert_close(MPOLinear([core, last]).weight, contract([core.expand(), last]))


@pytest.mark.parametrize(("topology", "route"), CASES)
def test_gradients_reach_cores_bias_and_input(topology: str, route: Route) -> None:
    layer = layer_of(topology, dtype=torch.float64).requires_grad_(True)
    layer.plan = always(route)
    x = torch.randn(40, IN, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(expected(layer, x).square().sum(), [x, *layer.parameters()])
    for result in (layer.run(x, route), layer(x)):
        found = torch.autograd.grad(result.square().sum(), [x, *layer.parameters()])
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_only_gradients_take_a_pivoted_layer_of_small_chi_off_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, taken = layer_of("pivoted-lowrank"), []
    run = layer.run
    monkeypatch.setattr(layer, "run", lambda x, route: (taken.append(route), run(x, route))[1])
    layer.plan = always("pivoted")
    x = torch.randn(3, IN)
    layer(x)
    layer.requires_grad_(True)
    layer(x)
    layer(x[:1])
    with torch.no_grad():
        layer(x)
    assert taken == ["pivoted", "expanded-last", "pivoted", "pivoted"]
    legs = resolve("pivoted-lowrank", OUT, IN)
    found = [in_training(legs, chi, 9, gpu=False) for chi in (1, OUT // 2, OUT // 2 + 1)]
    assert found == ["expanded-last", "expanded-last", None]
    assert in_training(resolve("lowrank", OUT, IN), 1, 9, gpu=False) is None
    assert [in_training(legs, 2, tokens, gpu=True) for tokens in (2, 3)] == [None, "rebuild"]
    assert [in_training(legs, OUT, tokens, gpu=False, reduced=True) for tokens in (9, 4096)] == [None, "rebuild"]


@pytest.mark.parametrize(("topology", "route"), CASES)
def test_frozen_layers_pass_gradients_to_their_input_even_after_inference(topology: str, route: Route) -> None:
    layer = layer_of(topology, dtype=torch.float64)
    layer.plan = always(route)
    with torch.inference_mode():
        layer(torch.randn(2, IN, dtype=torch.float64))
    x = torch.randn(40, IN, dtype=torch.float64, requires_grad=True)
    [wanted] = torch.autograd.grad(expected(layer, x).square().sum(), x)
    [found] = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(found, wanted)


def step(layer: MPOLinear) -> None:
    layer.requires_grad_(True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(3, IN, dtype=torch.float64)).sum().backward()
    optimizer.step()


def step_and_freeze(layer: MPOLinear) -> None:
    step(layer)
    layer.requires_grad_(False)


def write(layer: MPOLinear) -> None:
    with torch.no_grad():
        next(layer.parameters()).mul_(2)


def replace(layer: MPOLinear) -> None:
    name, parameter = next(iter(layer.named_parameters()))
    setattr(layer, name, nn.Parameter(2 * parameter, requires_grad=False))


def load(layer: MPOLinear) -> None:
    layer.load_state_dict(other_state(layer))


def load_assigning(layer: MPOLinear) -> None:
    layer.load_state_dict(other_state(layer), assign=True)


def other_state(layer: MPOLinear) -> dict[str, torch.Tensor]:
    [topology] = [name for name in TOPOLOGIES if resolve(name, OUT, IN) == layer.legs]
    return layer_of(topology, seed=9, dtype=torch.float64).state_dict()


def there_and_back(layer: MPOLinear) -> None:
    layer.bfloat16().double()


@pytest.mark.parametrize("change", [step, step_and_freeze, write, replace, load, load_assigning, there_and_back])
@pytest.mark.parametrize(("topology", "route"), CASES)
def test_nothing_kept_is_ever_stale(topology: str, route: Route, change: Change) -> None:
    layer = layer_of(topology, dtype=torch.float64)
    layer.plan = always(route)
    x = torch.randn(40, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = layer(x)
    change(layer)
    with torch.no_grad():
        after = layer(x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, expected(layer, x))


@pytest.mark.parametrize(("topology", "route"), CASES)
def test_a_copy_is_its_own_layer(topology: str, route: Route) -> None:
    layer = layer_of(topology, dtype=torch.float64)
    layer.plan = always(route)
    x = torch.ones(3, IN, dtype=torch.float64)
    before = layer(x)
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(twin(x), before)
    write(twin)
    torch.testing.assert_close(twin(x), expected(twin, x))
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(("topology", "route"), CASES)
def test_resident_bytes_are_the_stored_ones_and_what_the_route_keeps(topology: str, route: Route) -> None:
    layer = layer_of(topology, bias=False)
    layer.plan = always("rebuild")
    layer.prepare()
    stored = layer.resident_bytes
    layer.plan = always(route)
    orders = 16 * sum(core.shape[0] * core.shape[1] * core.shape[2] for core in layer.cores[:-1])
    kept = layer.resident_bytes - stored
    assert kept - 4 * extra_entries(layer.legs, CHI, route) in ((0,) if not layer.legs.pivoted else (0, orders))


@pytest.mark.parametrize("topology", ["lowrank", "pivoted-lowrank", "pivoted-mpo3"])
@pytest.mark.slow
def test_a_compiled_layer_is_one_graph_and_follows_a_load(topology: str) -> None:
    torch.compiler.reset()
    ways = routes(resolve(topology, OUT, IN))
    layers = nn.Sequential(*(layer_of(topology) for _ in ways))
    for layer, route in zip(layers, ways, strict=True):
        assert isinstance(layer, MPOLinear)
        layer.plan = always(route)
    compiled = torch.compile(_Sum(layers), fullgraph=True, backend="aot_eager")
    x = torch.randn(40, IN, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), _Sum(layers)(x), atol=1e-3, rtol=1e-4)
        before = compiled(x)
        for layer, other in zip(layers, (layer_of(topology, seed=9) for _ in ways), strict=True):
            layer.load_state_dict(other.state_dict())
        assert not torch.allclose(compiled(x), before)
        torch.testing.assert_close(compiled(x), _Sum(layers)(x), atol=1e-3, rtol=1e-4)


class _Sum(nn.Module):
    """The same input through every layer."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([layer(x) for layer in self.layers]).sum(0)


@pytest.mark.slow
def test_a_compiled_layer_trains() -> None:
    torch.compiler.reset()
    layer = layer_of("pivoted-lowrank")
    layer.plan = always("merged")
    layer.requires_grad_(True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(40, IN, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        optimizer.step()
    layer.requires_grad_(False)
    torch.testing.assert_close(compiled(x), expected(layer, x), atol=2e-4, rtol=1e-4)


@pytest.mark.e2e  # about 20 seconds
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
@pytest.mark.slow
def test_the_default_backend_compiles_a_pivoted_layer() -> None:
    torch.compiler.reset()
    layer = layer_of("pivoted-lowrank")
    x = torch.randn(40, IN, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), atol=2e-4, rtol=1e-4)


def test_what_is_no_chain_of_cores_is_refused() -> None:
    plain, pivoted = layer_of("mpo3"), layer_of("pivoted-mpo3")
    with pytest.raises(ValueError, match="must match and end in 1"):
        MPOLinear(plain.cores[:2])
    with pytest.raises(ValueError, match="all cores but the last must be pivoted"):
        MPOLinear([PivotedCore(pivoted.tail_0, torch.arange(32), (1, 4, 4, 7)), *plain.cores[1:]])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(IN, OUT), "up": nn.Linear(OUT, IN)}) for _ in "ab")


def applied(topology: str, packed: bool, planner: Planner | None = None) -> tuple[Model, Schedule, SizeModel]:
    torch.manual_seed(0)
    model = Model().requires_grad_(False)
    sites = discover_sites(model)
    weights = {site.name: dense_weight(model.get_submodule(site.name)) for site in sites}
    store = FactorStore(sites, weights, lambda: Statistics({}, {}, {}, 0), "", 0.1, FactorCache(None))
    sizes = SizeModel(model, sites)
    schedule = Schedule(tuple((site.name, Choice(topology, CHI, "plain")) for site in sites))
    ScheduleApplier(model, store, packed, planner).apply_(schedule)
    return model, schedule, sizes


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_packed_model_holds_what_its_schedule_stores_in_memory_of_its_own(topology: str) -> None:
    model, schedule, sizes = applied(topology, packed=True)
    assert model_parameters(model) == sizes.size(schedule).parameters
    for tensor in model.state_dict().values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_packed_or_not_the_matrices_are_the_same(topology: str) -> None:
    [views, packed] = [applied(topology, packed)[0] for packed in (False, True)]
    for name, layer in views.named_modules():
        if isinstance(layer, MPOLinear):
            other = packed.get_submodule(name)
            assert isinstance(other, MPOLinear)
            torch.testing.assert_close(other.weight, layer.weight, atol=1e-4, rtol=1e-4)


def test_an_applier_with_a_planner_gives_every_layer_its_plan() -> None:
    model, _, _ = applied("pivoted-lowrank", packed=True, planner=Planner("latency", measure=False))
    layers = [layer for layer in model.modules() if isinstance(layer, MPOLinear)]
    assert [layer.plan for layer in layers] == [Planner("latency", measure=False).plan(layer) for layer in layers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_was_in_the_scratch_buffer_never_reaches_a_result(dtype: torch.dtype, transposed: bool) -> None:
    """A product of bfloat16 on AMX reads beyond rows whose length is odd."""
    generator = torch.Generator().manual_seed(0)
    rows, chi, inputs = 1536, 419, 576
    last, tail = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((chi, inputs), (rows - chi, chi)))
    order = row_order(torch.randperm(rows, generator=generator)[:chi], rows)
    tokens = torch.randn(528, inputs, generator=generator).to(dtype)
    _buffer(1 << 22, tokens).fill_(torch.nan)
    with torch.no_grad():
        found = pivoted_product(tokens, last, tail, order, transposed)
        expected = tokens.double() @ (unfolding(tail.double(), order) @ last.double()).T
    assert torch.isfinite(found).all()
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("topology", ["pivoted-lowrank", "lowrank"])
def test_many_tokens_of_16_bits_are_multiplied_with_the_matrix(topology: str, autocast: bool) -> None:
    legs = resolve(topology, 48, 40)
    cores = [torch.randn(left, o, i, right) / 4 for left, o, i, right in ((1, 48, 1, 11), (11, 1, 40, 1))]
    layer = MPOLinear(stored(cores, legs.pivoted)).to(torch.float32 if autocast else torch.bfloat16)
    exact = contract([core.double() for core in layer.cores])
    for tokens in (1, 8, 31, 32, 200):
        rows = torch.randn(2, tokens, 40).bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = layer(rows)
            formed = torch.equal(found, torch.nn.functional.linear(rows, layer.weight))
        expected = rows.double() @ exact.T
        assert found.dtype == torch.bfloat16
        assert float((found.double() - expected).norm() / expected.norm()) < 0.01
        assert formed or 2 * tokens < 32
    layer.plan = always("merged")  # a plan that was chosen is followed
    with torch.no_grad():
        layer(torch.randn(40, 40, dtype=layer.cores[0].dtype))
    assert layer.resident_bytes > sum(each.numel() * each.element_size() for each in layer.state_dict().values())
    assert formed_quickly(legs, 11, 32)
    assert not formed_quickly(resolve(topology, 4864, 896), 500, 512)

"""The engine on small torch models: sites, statistics, whitening, factors, applying and restoring."""

import copy
import hashlib
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_model import Conv1D
from torch import nn

from compression import (
    Choice,
    FactorCache,
    FactorStore,
    MPOLinear,
    Schedule,
    ScheduleApplier,
    Site,
    Statistics,
    Whitening,
    collect,
    contract,
    dense_weight,
    discover_sites,
    lagrangian,
    model_parameters,
    shrink,
    to_schedule,
)
from compression.calibration.statistics import MomentAccumulator
from compression.size import SizeModel


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.mlp = nn.ModuleDict({"fc": Conv1D(2 * width, width), "proj": nn.Linear(2 * width, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(self.q_proj(x)) * self.v_proj(x)
        return x + self.mlp["proj"](torch.relu(self.mlp["fc"](x)))


class TinyModel(nn.Module):
    def __init__(self, width: int = 12, blocks: int = 3, vocabulary: int = 17) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.embedding.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=self.lm_head(x))


@pytest.fixture
def model() -> TinyModel:
    torch.manual_seed(0)
    return TinyModel().eval().requires_grad_(False)


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(17, (4, 20), generator=generator) for _ in range(count)]
    return [(batch, torch.ones_like(batch, dtype=torch.bool)) for batch in ids]


def statistics_of(model: TinyModel) -> Statistics:
    return collect(model, discover_sites(model), batches(), torch.Generator().manual_seed(2))


def store_of(model: TinyModel, cache: Path | None = None, build: Callable[[], Statistics] | None = None) -> FactorStore:
    sites = discover_sites(model)
    weights = {site.name: dense_weight(model.get_submodule(site.name)).clone() for site in sites}
    return FactorStore(sites, weights, build or (lambda: statistics_of(model)), "key", 0.01, FactorCache(cache))


def test_sites_are_found_without_head_and_embeddings_and_named_by_family(model: TinyModel) -> None:
    sites = discover_sites(model)
    assert len(sites) == 12
    assert [site.family for site in sites[:4]] == ["q", "v", "fc", "proj"] or {site.family for site in sites[:4]} == {
        "q",
        "v",
        "fc",
        "proj",
    }
    assert [site.block for site in sites] == [0] * 4 + [1] * 4 + [2] * 4
    transposed = next(site for site in sites if site.family == "fc")
    assert (transposed.out_features, transposed.in_features) == (24, 12)
    assert not any("lm_head" in site.name or "embedding" in site.name for site in sites)


def test_tied_weights_count_once(model: TinyModel) -> None:
    assert model_parameters(model) == 17 * 12 + 3 * (2 * 144 + 24 * 12 + 24 + 24 * 12 + 12)


def test_a_model_without_blocks_and_one_with_nan_are_refused(model: TinyModel) -> None:
    with pytest.raises(ValueError, match="ModuleList"):
        discover_sites(nn.Linear(3, 3))
    model.layers[1].q_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.q_proj"):
        discover_sites(model)


def test_statistics_equal_a_direct_computation(model: TinyModel) -> None:
    statistics = statistics_of(model)
    inputs = []
    handle = model.layers[1].q_proj.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    for ids, _ in batches():
        model(ids)
    handle.remove()
    rows = torch.cat([x.reshape(-1, 12) for x in inputs]).double()
    assert torch.allclose(statistics.input("layers.1.q_proj").double(), rows.T @ rows / len(rows), atol=1e-5)
    assert statistics.input_of["layers.1.v_proj"] == "layers.1.q_proj"
    assert statistics.input("layers.1.q_proj") is not statistics.input("layers.1.mlp.proj")
    assert statistics.tokens == 3 * 4 * 20


def test_gradient_moment_of_the_last_layer_matches_the_exact_fisher() -> None:
    """For logits = W x the Fisher block of the output is E[diag(p) − p pᵀ]; sampling must converge to it."""
    torch.manual_seed(3)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 6))])

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

        def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
            return SimpleNamespace(logits=self.layers[0](self.embedding(input_ids)))

    last = Last().eval().requires_grad_(False)
    ids = torch.randint(5, (64, 256))
    statistics = collect(
        last, discover_sites(last), [(ids, torch.ones_like(ids, dtype=torch.bool))], torch.Generator().manual_seed(0)
    )
    p = torch.softmax(last(ids).logits, -1).reshape(-1, 6)
    exact = torch.diag(p.mean(0)) - p.T @ p / len(p)
    assert torch.allclose(statistics.gradient("layers.0.0"), exact, atol=0.01)


def test_weights_follow_inputs_and_gradients_that_are_not_independent() -> None:
    """Every fourth token has a huge input in one direction and hardly a gradient, as attention sinks do."""
    generator = torch.Generator().manual_seed(0)
    tokens, inputs, outputs = 4096, 6, 5
    x, g = (torch.randn(tokens, size, generator=generator) for size in (inputs, outputs))
    x[::4] = 30 * x[::4, :1] * torch.nn.functional.normalize(torch.ones(inputs), dim=0)
    g[::4] *= 0.01
    linear = nn.Linear(inputs, outputs).requires_grad_(False)
    block = nn.Sequential(nn.Identity(), linear)
    block.get_input_embeddings = lambda: block[0]
    site, mask = Site("1", 0, "q", outputs, inputs), torch.ones(1, 256, dtype=torch.bool)
    errors = torch.randn(40, outputs, inputs, generator=generator)
    true = 0.5 * torch.einsum("to,koi,ti->kt", g, errors, x).square().mean(1)
    first, spreads = None, []
    for _ in range(2):
        accumulator = MomentAccumulator(block, [site], first)
        with accumulator:
            for one, other in zip(x.split(256), g.split(256), strict=True):
                accumulator.expect(mask)
                block(one[None].clone().requires_grad_()).backward(other[None])
                accumulator.count()
        first = accumulator.result()
        predicted = 0.5 * ((first.gradient("1") @ errors @ first.input("1")) * errors).sum((1, 2))
        spreads.append(float((predicted / true).log().std()))
    assert spreads[1] < 0.5 * spreads[0]


def test_masked_positions_count_nowhere(model: TinyModel) -> None:
    ids, mask = batches(1)[0]
    padded = torch.cat([ids, torch.zeros(4, 5, dtype=torch.long)], 1)
    wide = torch.cat([mask, torch.zeros(4, 5, dtype=torch.bool)], 1)
    sites = discover_sites(model)
    plain = collect(model, sites, [(ids, mask)], torch.Generator().manual_seed(0))
    with_padding = collect(model, sites, [(padded, wide)], torch.Generator().manual_seed(0))
    assert with_padding.tokens == plain.tokens
    for site in sites:
        assert torch.allclose(plain.input(site.name), with_padding.input(site.name), atol=1e-5)


def test_no_calibration_text_is_refused(model: TinyModel) -> None:
    with pytest.raises(ValueError, match="no calibration token"):
        collect(model, discover_sites(model), [], torch.Generator())


def test_two_sided_truncation_is_optimal_in_its_metric_and_its_cost_is_exact(model: TinyModel) -> None:
    store, statistics = store_of(model), statistics_of(model)
    menu = store.menu()
    for site, options in zip(store.sites, menu.sites, strict=True):
        weight = dense_weight(model.get_submodule(site.name)).double()
        c = shrink(statistics.input(site.name), 0.01)
        g = shrink(statistics.gradient(site.name), 0.01)
        for index in (0, len(options.choices) // 2):
            choice = options.choices[index]
            error = weight - contract([core.double() for core in store.cores(site.name, choice)])
            cost = 0.5 * float(torch.trace(g @ error @ c @ error.T))
            assert cost == pytest.approx(options.cost[index], rel=1e-3)
            for metric in ("plain", "input"):
                other = weight - contract(
                    [core.double() for core in store.cores(site.name, Choice("pivoted-lowrank", choice.chi, metric))]
                )
                assert cost <= 0.5 * float(torch.trace(g @ other @ c @ other.T)) * (1 + 1e-4)


def test_whitening_undoes_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    c, g = (torch.randn(n, n, generator=generator).double() for n in (5, 7))
    whitening = Whitening.of(c @ c.T, g @ g.T, 0.1)
    weight = torch.randn(7, 5, generator=generator)
    again = whitening.undo_right(whitening.undo_left(whitening.apply(weight)))
    assert torch.allclose(again, weight.double())


def test_rank_deficient_and_zero_statistics_still_whiten() -> None:
    rank_one = torch.ones(4, 4)
    for moment in (rank_one, torch.zeros(4, 4)):
        assert torch.isfinite(Whitening.of(moment, moment, 1e-3).apply(torch.eye(4))).all()
    with pytest.raises(ValueError, match="NaN"):
        shrink(torch.full((3, 3), torch.nan), 0.1)
    with pytest.raises(ValueError, match="shrinkage"):
        shrink(rank_one, 0.0)


def test_restoring_gives_the_dense_model_bit_for_bit(model: TinyModel) -> None:
    ids = batches(1)[0][0]
    before, state = model(ids).logits, copy.deepcopy(model.state_dict())
    store = store_of(model)
    menu = store.menu()
    with ScheduleApplier(model, store) as applier:
        applier.apply_(to_schedule(menu, lagrangian(menu, int(0.5 * menu.dense_parameters))))
        assert not torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_only_sites_that_differ_are_touched(model: TinyModel) -> None:
    store = store_of(model)
    names = [site.name for site in store.sites]
    applier = ScheduleApplier(model, store)
    first = Schedule(tuple((name, Choice("lowrank", 3, "two-sided")) for name in names))
    assert applier.apply_(first) == names
    untouched = model.get_submodule(names[0])
    second = Schedule(tuple((name, Choice("lowrank", 4 if name == names[1] else 3, "two-sided")) for name in names))
    assert applier.apply_(second) == [names[1]]
    assert model.get_submodule(names[0]) is untouched


def test_layers_of_a_schedule_are_freed_before_those_of_the_next_are_made(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(model)
    names = [site.name for site in store.sites]
    applier = ScheduleApplier(model, store)
    one, other = (Schedule(tuple((name, Choice("lowrank", chi, "two-sided")) for name in names)) for chi in (3, 4))
    applier.apply_(one)
    layers = [weakref.ref(model.get_submodule(name)) for name in names]
    made, seen = applier.module, []

    def module(name: str, choice: Choice) -> torch.nn.Module:
        seen.append(sum(layer() is not None for layer in layers))
        return made(name, choice)

    monkeypatch.setattr(applier, "module", module)
    applier.apply_(other)
    assert seen == [0] * len(names)
    assert {model.get_submodule(name).chi for name in names} == {4}


def test_applied_layers_compute_the_contracted_matrix_with_bias(model: TinyModel) -> None:
    store = store_of(model)
    x = torch.randn(3, 5, 12)
    for topology, metric in (("lowrank", "input"), ("mpo2", "plain"), ("mpo3", "plain")):
        applier = ScheduleApplier(model, store)
        names = [site.name for site in store.sites]
        target = "layers.0.mlp.fc"
        dense_bias = model.get_submodule(target).bias
        choices = {name: Choice("dense", 0, "none") for name in names} | {target: Choice(topology, 2, metric)}
        applier.apply_(Schedule(tuple(choices.items())))
        layer = model.get_submodule(target)
        assert isinstance(layer, MPOLinear)
        expected = x @ contract(store.cores(target, choices[target])).T + dense_bias
        assert torch.allclose(layer(x), expected, atol=1e-5)
        assert torch.allclose(layer.weight, contract(store.cores(target, choices[target])))
        applier.restore_()


def test_a_schedule_that_does_not_fit_is_refused_and_changes_nothing(model: TinyModel) -> None:
    store = store_of(model)
    applier = ScheduleApplier(model, store)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="every site"):
        applier.apply_(Schedule((("layers.0.q_proj", Choice("lowrank", 2, "plain")),)))
    too_large = Schedule(tuple((site.name, Choice("lowrank", 99, "plain")) for site in store.sites))
    with pytest.raises(ValueError, match="at most"):
        applier.apply_(too_large)
    assert dict(model.named_modules()) == before


def test_factors_come_from_the_cache_without_statistics(model: TinyModel, tmp_path: Path) -> None:
    first = store_of(model, tmp_path).menu()

    def unexpected() -> Statistics:
        raise AssertionError("statistics asked for although every factor is cached")

    second = store_of(model, tmp_path, unexpected).menu()
    assert all((a.cost == b.cost).all() for a, b in zip(first.sites, second.sites, strict=True))


def test_a_damaged_cache_file_is_set_aside_and_rebuilt_to_the_same_numbers(model: TinyModel, tmp_path: Path) -> None:
    first = store_of(model, tmp_path).menu()
    files = sorted(tmp_path.rglob("*.safetensors"))
    flipped = bytearray(files[0].read_bytes())
    flipped[-1] ^= 1
    files[0].write_bytes(flipped)
    files[1].write_bytes(files[1].read_bytes()[:50])
    files[2].write_bytes(b"")
    pickled = pickle.dumps({"core.0": 1})
    files[3].unlink()
    key = files[3].name.split(".")[0]
    (files[3].parent / f"{key}.{hashlib.sha256(pickled).hexdigest()[:32]}.safetensors").write_bytes(pickled)
    with pytest.warns(UserWarning, match="damaged"):
        second = store_of(model, tmp_path).menu()
    assert all((a.cost == b.cost).all() for a, b in zip(first.sites, second.sites, strict=True))
    assert len(list(tmp_path.rglob("*.damaged"))) == 4
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(files)


def test_statistics_survive_a_round_trip_through_a_bundle(model: TinyModel, tmp_path: Path) -> None:
    cache = FactorCache(tmp_path)
    statistics = statistics_of(model)
    cache.store("ab" * 32, statistics.to_bundle())
    bundle = cache.load("ab" * 32)
    assert bundle is not None
    again = Statistics.from_bundle(bundle)
    assert again.tokens == statistics.tokens
    assert torch.equal(again.input("layers.2.v_proj"), statistics.input("layers.2.v_proj"))


def test_size_counts_what_the_modules_hold(model: TinyModel) -> None:
    store = store_of(model)
    menu = store.menu()
    schedule = to_schedule(menu, lagrangian(menu, int(0.6 * menu.dense_parameters)))
    size = SizeModel(model, store.sites).size(schedule)
    applier = ScheduleApplier(model, store, packed=True)
    applier.apply_(schedule)
    assert model_parameters(model) == size.parameters
    places = sum(4 * buffer.numel() for name, buffer in model.named_buffers() if "places_" in name)
    assert places > 0
    assert size.bytes == 4 * size.parameters + places
    assert size.kept_fraction <= 0.6
    applier.restore_()
    dense = Schedule.dense(tuple(site.name for site in store.sites))
    assert SizeModel(model, store.sites).size(dense).kept_fraction == 1

"""Streaming: block by block gives what the whole model gives, whatever the batches, and leaves nothing behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from compression import FactorCache, FactorStore, Site, Statistics, collect, dense_weight, discover_sites
from compression.calibration.footprint import BlockShape, footprint
from compression.calibration.streaming import passes, stream
from compression.layers.experts import take_apart_
from search.model.loading import load_model, model_digest
from search.model.random_models import SHAPES
from search.model.streaming import StreamedModel, decompose_streamed

CPU = torch.device("cpu")
MODELS = ("random:tiny-llama", "random:tiny-qwen2", "random:tiny-gpt2")


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model saved in several shards."""
    loaded = load_model(request.param, "cpu")
    loaded.model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    return tmp_path / "model"


def batches(rows: int = 6, split: int = 2, padded: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids = torch.randint(257, (rows, 24), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[1, 20:] = False
        mask[-1, 7:] = False
    return list(zip(ids.split(split), mask.split(split), strict=True))


def streamed(name: str, data: list[tuple[torch.Tensor, torch.Tensor]], scratch: Path | None = None) -> Statistics:
    """All blocks' statistics as one."""
    parts: list[Statistics] = []

    def visit(block: nn.Module, sites: tuple[Site, ...], statistics: Statistics) -> None:
        parts.append(statistics)

    stream(StreamedModel(name, CPU, torch.float32), data, torch.Generator().manual_seed(3), visit, scratch)
    tables: tuple[dict[str, torch.Tensor], dict[str, str], dict[str, torch.Tensor]] = ({}, {}, {})
    for part in parts:
        tables[0].update(part.inputs)
        tables[1].update(part.input_of)
        tables[2].update(part.gradients)
    return Statistics(*tables, parts[0].tokens)


def assert_equal_moments(one: Statistics, other: Statistics, sites: tuple[Site, ...]) -> None:
    assert one.tokens == other.tokens
    for site in sites:
        for moment, expected in (
            (one.input(site.name), other.input(site.name)),
            (one.gradient(site.name), other.gradient(site.name)),
        ):
            assert torch.allclose(moment, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())), site.name


@pytest.mark.parametrize("padded", [False, True])
def test_streaming_gives_the_statistics_of_the_whole_model(folder: Path, padded: bool) -> None:
    loaded = load_model(str(folder), "cpu")
    sites = discover_sites(loaded.model)
    whole = collect(loaded.model, sites, batches(padded=padded), torch.Generator().manual_seed(3))
    assert_equal_moments(streamed(str(folder), batches(padded=padded)), whole, sites)


def test_experts_are_streamed_one_by_one_where_the_files_hold_them_so(tmp_path: Path) -> None:
    loaded = load_model("random:tiny-qwen3-moe", "cpu")
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    take_apart_(loaded.model)
    sites = discover_sites(loaded.model)
    whole = collect(loaded.model, sites, batches(padded=True), torch.Generator().manual_seed(3))
    free = tuple(site for site in sites if not site.dense_because)
    assert sum(".experts." in site.name for site in free) == 3 * 4 * 3
    assert_equal_moments(streamed(str(tmp_path / "model"), batches(padded=True)), whole, free)
    model = StreamedModel(str(tmp_path / "model"), CPU, torch.float32)
    assert model.sites == sites
    decompose_streamed(
        model, batches(), torch.Generator(), FactorCache(None), statistics_key="key", shrinkage=0.01, blocks=[2]
    )


@pytest.mark.parametrize("split", [1, 6])
def test_the_batches_do_not_matter(folder: Path, split: int) -> None:
    sites = StreamedModel(str(folder), CPU, torch.float32).sites
    assert_equal_moments(streamed(str(folder), batches(split=split)), streamed(str(folder), batches()), sites)


def test_nothing_is_left_on_disk_and_blocks_come_last_first(folder: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    seen, done = [], []
    model = StreamedModel(str(folder), CPU, torch.float32)
    stream(
        model,
        batches(),
        torch.Generator().manual_seed(0),
        lambda block, sites, statistics: seen.append(sites[0].block),
        scratch,
        done.append,
    )
    assert seen == [2, 1, 0]
    assert done == list(range(1, passes(3, 3) + 1))
    assert list(scratch.iterdir()) == []


def test_only_norms_are_in_memory_between_blocks(folder: Path) -> None:
    model = StreamedModel(str(folder), CPU, torch.float32)
    resident = {name for name, parameter in model._model.named_parameters() if not parameter.is_meta}
    assert all("norm" in name or "ln_" in name or "wpe" in name for name in resident)
    assert all(parameter.is_meta for template in model._templates for parameter in template.parameters())


def test_factors_are_those_of_the_whole_model_under_the_same_keys(folder: Path, tmp_path: Path) -> None:
    cache = FactorCache(tmp_path / "factors")
    data, generator = batches(), torch.Generator().manual_seed(3)
    model = StreamedModel(str(folder), CPU, torch.float32)
    decompose_streamed(model, data, generator, cache, statistics_key="key", shrinkage=0.01)
    loaded = load_model(str(folder), "cpu")
    sites = discover_sites(loaded.model)
    weights = {site.name: dense_weight(loaded.model.get_submodule(site.name)) for site in sites}

    def unexpected() -> Statistics:
        raise AssertionError("a factor is not in the cache")

    found = FactorStore(sites, weights, unexpected, "key", 0.01, cache).menu()
    statistics = collect(loaded.model, sites, data, torch.Generator().manual_seed(3))
    expected = FactorStore(sites, weights, lambda: statistics, "key", 0.01, FactorCache(None)).menu()
    for one, other in zip(found.sites, expected.sites, strict=True):
        assert torch.allclose(torch.tensor(one.cost), torch.tensor(other.cost), rtol=1e-3, atol=1e-9)


def test_no_token_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="no calibration token"):
        streamed(str(folder), [])


def test_a_missing_weight_is_named(folder: Path) -> None:
    config = folder / "config.json"
    text = re.sub(r'"(num_hidden_layers|n_layer)": 3', r'"\1": 4', config.read_text())
    config.write_text(re.sub(r'"layer_types": \[', '"layer_types": ["full_attention", ', text))
    with pytest.raises(ValueError, match=r"lacks the weight .*\.3\."):
        streamed(str(folder), batches())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("random:llama-3.2-1b", 1_235_814_400),
        ("random:qwen2.5-1.5b", 1_543_714_304),
        ("random:llama-2-7b", 6_738_415_616),
    ],
)
def test_random_shapes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    from search.model.architecture import empty_model
    from search.model.sources import locate

    model = empty_model(locate(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_streamed_random_block_is_the_block_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 300, "head_dim": 8}
    few = {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(SHAPES, "random:llama-3.2-1b", SHAPES["random:llama-3.2-1b"] | small | few)
    loaded = load_model("random:llama-3.2-1b", "cpu")
    assert loaded.digest == model_digest(load_model("random:llama-3.2-1b", "cpu").model)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    block = StreamedModel("random:llama-3.2-1b", CPU, torch.float32).block(1)
    for name, parameter in loaded.model.model.layers[1].named_parameters():
        assert torch.equal(block.get_parameter(name), parameter)


def test_the_footprint_of_a_70b_shape_is_a_fraction_of_the_model() -> None:
    shape = BlockShape(8192, 28672, 1024, 80, 128256, False, 2)
    assert shape.model_bytes == pytest.approx(2 * 70.55e9, rel=0.01)
    assert shape.block_bytes == 2 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    needed = footprint(shape, tokens=65536, batch_tokens=1024, row_tokens=256)
    assert needed.peak == max(needed.ends, needed.collecting, needed.decomposing)
    assert needed.peak < shape.model_bytes / 3
    assert needed.scratch == 83 * 65536 * 8192 * 2


def test_an_unknown_shape_names_the_nearest_and_all_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"random:qwen2\.5-1\.5b, random:llama-2-7b, .* nearest is random:llama-2-7b"):
        load_model("random:llama2-7b", "cpu")

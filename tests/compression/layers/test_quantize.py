"""Group-wise integers: what they give back, what they weigh, and that rounding follows the metric."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_model import assert_same_logits, assert_same_tensors, tensorized
from torch import nn
from transformers import AutoModelForCausalLM

from compression import MPOLinear
from compression.layers.packed import PackedEmbedding, PackedLinear, PackedMPO
from compression.layers.planner import Planner
from compression.layers.quantize import packed, quantize_
from compression.numerics.group_integers import Metric, dequantize, quantize
from compression.numerics.packed_size import BITS, packed_bytes
from search.export.folder import export_dense_, export_model, footprint
from search.model.ends import ends
from search.model.loading import load_for_use, load_model

PROMPT = torch.arange(40).reshape(2, 20)


def given(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator)


def back(codes, columns, bits, group):
    return dequantize(codes.codes, codes.scales.float(), columns, bits, group)


def loss(error, moment):
    return float(((error.double() @ moment) * error.double()).sum())


@torch.no_grad()
def logits(model):
    return model(PROMPT, attention_mask=torch.ones_like(PROMPT)).logits


@pytest.mark.parametrize("columns", [64, 37, 1])
@pytest.mark.parametrize(("bits", "step"), [(8, 1 / 128), (6, 1 / 32), (5, 1 / 16), (4, 1 / 8), (3, 1 / 4), (2, 1 / 2)])
def test_no_entry_is_off_by_more_than_its_group_allows(columns, bits, step):
    matrix = given(20, columns)
    result = back(quantize(matrix, bits, 16), columns, bits, 16)
    for start in range(0, columns, 16):
        part = matrix[:, start : start + 16]
        largest = part.abs().amax(1, keepdim=True)
        assert ((result[:, start : start + 16] - part).abs() <= 1.01 * step * largest * (1 if bits == 8 else 3.5)).all()


@pytest.mark.parametrize("bits", BITS)
def test_what_is_on_the_grid_comes_back_exactly(bits):
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (12, 32), generator=torch.Generator().manual_seed(1)).float()
    codes[:, ::16] = -half
    matrix = codes * 0.25
    assert torch.equal(back(quantize(matrix, bits, 16), 32, bits, 16), matrix)


@pytest.mark.parametrize(
    ("columns", "bits", "group"),
    [(64, 8, 16), (64, 4, 16), (37, 4, 64), (1, 4, 1), (37, 3, 16), (9, 5, 64), (7, 6, 64), (5, 2, 64)],
)
def test_bytes_are_those_of_the_tensors(columns, bits, group):
    codes = quantize(given(6, columns), bits, group)
    assert codes.codes.nbytes + codes.scales.nbytes == packed_bytes(6, columns, bits, group)


def test_zeros_stay_zeros_and_tiny_numbers_finite():
    assert not back(quantize(torch.zeros(3, 8), 4, 4), 8, 4, 4).any()
    assert torch.isfinite(back(quantize(torch.full((3, 8), 1e-12), 4, 4), 8, 4, 4)).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_moment_lowers_the_error_in_its_metric(bits):
    matrix, inputs = given(24, 64), given(400, 64, 1) @ given(64, 64, 2)
    moment = (inputs.T @ inputs / 400).double()
    plain, metric = (back(quantize(matrix, bits, 16, each), 64, bits, 16) for each in (None, Metric(moment)))
    assert loss(metric - matrix, moment) < 0.8 * loss(plain - matrix, moment)


@pytest.mark.parametrize(("bits", "group"), [(7, 16), (4, 0)])
def test_other_bits_are_refused(bits, group):
    with pytest.raises(ValueError, match="8, 6, 5, 4, 3 or 2"):
        quantize(torch.zeros(2, 2), bits, group)


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        quantize(torch.tensor([[float("nan")]]), 4, 4)


def layers(name="random:tiny-llama"):
    return [module for module in tensorized(name).model.modules() if isinstance(module, MPOLinear)]


def test_packed_cores_of_every_topology_compute_nearly_the_same():
    seen = set()
    for layer in layers():
        activations = given(5, layer.in_features)
        expected, weight = layer(activations), layer.weight
        twin = packed(layer, 8, 16, None)
        seen.add(layer.legs)
        assert isinstance(twin, PackedMPO)
        assert (twin(activations) - expected).norm() < 0.02 * expected.norm()
        torch.testing.assert_close(twin(activations), activations @ twin.weight.T, rtol=1e-4, atol=1e-4)
        assert (twin.weight - weight).norm() < 0.02 * weight.norm()
    assert len(seen) >= 4


def test_the_tail_makes_up_for_the_rounding_of_the_last_core():
    for layer in layers():
        if not layer.legs.pivoted or layer.legs.in_legs[0] != 1:
            continue
        weight, inputs = layer.weight, given(300, layer.in_features, 3) @ given(layer.in_features, layer.in_features, 4)
        moment = (inputs.T @ inputs / 300).double()
        plain, metric = (packed(copy.deepcopy(layer), 4, 16, each).weight for each in (None, (moment, None)))
        assert loss(metric - weight, moment) < loss(plain - weight, moment)


@pytest.fixture
def quantized():
    loaded = tensorized()
    modules = dict(loaded.model.named_modules())
    names = [name for name, module in modules.items() if isinstance(module, MPOLinear | nn.Linear | nn.Embedding)]
    before = logits(loaded.model)
    quantize_(loaded.model, dict.fromkeys(names, 8), lambda name: None, group=16)
    return loaded, before


def test_a_quantized_model_computes_nearly_the_same_from_a_third_of_the_bytes(quantized):
    loaded, before = quantized
    assert (logits(loaded.model) - before).norm() < 0.05 * before.norm()
    assert footprint(loaded.model).stored < 0.4 * footprint(tensorized().model).stored


def test_a_shared_matrix_is_stored_once(quantized):
    model = quantized[0].model
    assert isinstance(model.lm_head, PackedLinear)
    assert isinstance(model.model.embed_tokens, PackedEmbedding)
    assert model.lm_head.stored is model.model.embed_tokens.packed
    assert not any(name.startswith("lm_head") for name in model.state_dict())
    assert ends(tensorized().model) == ["model.embed_tokens", "lm_head"]


@pytest.mark.slow
def test_a_quantized_folder_gives_the_same_tensors_and_logits_and_casts(quantized, tmp_path):
    loaded, _ = quantized
    export_model(loaded.model, loaded.tokenizer, tmp_path / "out")
    read = load_for_use(str(tmp_path / "out"), "cpu").model
    assert_same_tensors(read, loaded.model)
    assert_same_logits(logits(read), logits(loaded.model))
    size = footprint(read).stored
    assert size == footprint(loaded.model).stored
    scales = read.model.embed_tokens.packed.scales.clone()
    read.to(torch.bfloat16)
    assert torch.equal(read.model.embed_tokens.packed.scales, scales)
    assert logits(read).dtype == torch.bfloat16
    read.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    # `to` has rounded the frequencies of positions too, which loading computes anew.
    torch.testing.assert_close(logits(again), logits(read), rtol=0.05, atol=0.2)


def test_a_quantized_model_is_exported_dense_too(quantized, tmp_path):
    loaded, _ = quantized
    before = logits(loaded.model)
    export_dense_(loaded.model, loaded.tokenizer, tmp_path / "out")
    torch.testing.assert_close(logits(load_model(str(tmp_path / "out"), "cpu").model), before, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lm_head", {"tied": "model.norm"}, "does not fit"),
        ("model.embed_tokens", {"bits": 7}, "bits must be 8, 6, 5, 4, 3 or 2 .*, got 7"),
        ("model.embed_tokens", {"group": 0}, "group 1 to .* and 0$"),
        ("model.embed_tokens", {"group": 32}, "no such tensor|has shape"),
    ],
)
def test_a_packed_description_that_does_not_fit_is_refused(quantized, tmp_path, name, change, message):
    loaded, _ = quantized
    export_model(loaded.model, loaded.tokenizer, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    document = json.loads(file.read_text())
    document["quantization_config"]["modules"][name].update(change)
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="was changed after the weights were written"):
        load_for_use(str(tmp_path / "out"), "cpu")
    weights = tmp_path / "out" / "model.safetensors"
    with safe_open(weights, "pt") as stored:  # a folder of an earlier version, whose weights do not know their config
        metadata = {key: value for key, value in stored.metadata().items() if key != "chisel_config"}
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    save_file(tensors, weights, metadata)
    with pytest.raises(ValueError, match=message):
        load_for_use(str(tmp_path / "out"), "cpu")


@pytest.mark.parametrize("bits", BITS)
def test_a_packed_layer_keeps_its_matrix_where_speed_is_wanted(bits):
    layer, rows = nn.Linear(40, 12).requires_grad_(False), given(5, 40)
    model = nn.Sequential(packed(layer, bits, 16))
    wanted, state = model(rows), set(model.state_dict())
    torch.testing.assert_close(wanted, rows @ model[0].weight.T + layer.bias)
    small, kept = (Planner(goal).plan_(model) for goal in ("memory", "latency"))
    assert small.resident_bytes == small.stored_bytes == packed_bytes(12, 40, bits, 16) + 4 * 12
    assert kept.resident_bytes == small.resident_bytes + 4 * 12 * 40
    assert torch.equal(model(rows), wanted)
    assert set(model.state_dict()) == state

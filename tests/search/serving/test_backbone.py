"""The model that an engine makes from a compressed folder and fills itself, as vLLM's Transformers backend does."""

import json
import shutil

import pytest
import torch
from cut_model import cut_model
from safetensors.torch import load_file
from tiny_model import assert_same_logits, tensorized
from transformers import AutoConfig, AutoModel

from compression.layers.quantize import quantize_
from compression.layers.served import Absent, ServedMPO
from compression.refusal import Refusal
from search.export.folder import export_model
from search.serving.backbone import ARCHITECTURE, description_of, verify_once

PROMPT = torch.arange(40).reshape(2, 20)


def exported(loaded, folder):
    export_model(loaded.model, loaded.tokenizer, folder)
    return AutoConfig.from_pretrained(folder, trust_remote_code=True)


def filled(config, folder):
    """What an engine does: make the base model without values, then hand each tensor to its module."""
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True)
    rotary = type(model.rotary_emb)(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.full_like(parameter, torch.nan, device="cpu")))
    model.rotary_emb = rotary
    inside = dict(model.named_modules())
    waiting = {name for name, _ in model.named_parameters()}
    for path, values in load_file(folder / "model.safetensors").items():
        owner, _, leaf = path.removeprefix("model.").rpartition(".")
        waiting.discard(path.removeprefix("model."))
        if load := getattr(inside[owner], "load_weights", None):
            assert load([(leaf, values)]) == {leaf}
        elif not leaf.startswith("kept_"):
            getattr(inside[owner], leaf).data.copy_(values)
    assert not waiting
    return model.eval()


@torch.no_grad()
def states(model):
    return model(PROMPT, attention_mask=torch.ones_like(PROMPT)).last_hidden_state


@pytest.mark.parametrize(
    "make",
    [
        tensorized,
        lambda: tensorized("random:tiny-qwen2"),
        lambda: cut_model("random:tiny-llama", "factors"),
        lambda: cut_model("random:tiny-llama", "empty"),
    ],
)
def test_the_filled_model_computes_the_same(make, tmp_path):
    made = make()
    if hasattr(made, "apply"):
        made.apply()
        made = made.loaded
    model = filled(exported(made, tmp_path / "hf"), tmp_path / "hf")
    assert_same_logits(states(model), states(made.model.model))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a model with factors, for tests that do not change it."""
    path = tmp_path_factory.mktemp("exported") / "hf"
    exported(tensorized(), path)
    return path


def test_an_engine_sees_no_quantization_and_another_architecture(folder):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.architectures == [ARCHITECTURE]
    assert getattr(config, "quantization_config", None) is None
    config.quantization_config = {"quant_method": "chisel", "modules": {}}  # vLLM sets it from the file again
    assert getattr(config, "quantization_config", None) is None
    assert description_of(config) == {}


def test_an_engine_is_told_the_heads_of_each_layer(tmp_path):
    cut = cut_model("random:tiny-llama")
    cut.apply()
    config = exported(cut.loaded, tmp_path / "hf")
    assert config.is_heterogeneous
    assert [each.num_key_value_heads for each in config.per_layer_config] == [1, 1, 1]
    assert [each.num_attention_heads for each in config.per_layer_config] == [2, 2, 2]


def test_modules_with_parts_of_different_kinds_have_classes_of_their_own(folder):
    """vLLM decides by the class of a module whether its linear layers are fused."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True)
    for layer in model.layers:
        for other in model.layers:
            for part in ("self_attn", "mlp"):
                kinds = [[type(each).__name__ for each in getattr(one, part).children()] for one in (layer, other)]
                assert (kinds[0] == kinds[1]) == (type(getattr(layer, part)) is type(getattr(other, part)))


def test_a_changed_folder_is_refused(folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "changed")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="damaged, its checksum differs"), torch.device("meta"):
        AutoModel.from_config(config, trust_remote_code=True)
    with pytest.raises(Refusal, match="damaged"):
        verify_once(str(folder))


@pytest.mark.parametrize("trusted", [True, False])
def test_a_folder_of_a_newer_format_says_so(folder, trusted, tmp_path):
    """With trust the code of the folder reads it; without, an engine hands its description to Chisel."""
    folder = shutil.copytree(folder, tmp_path / "newer")
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"]["format"] = 99
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"this model has format 99, .* reads formats 1 to 4; get a newer Chisel"):
        description_of(AutoConfig.from_pretrained(folder, trust_remote_code=trusted))


def test_integers_are_refused(tmp_path):
    loaded = tensorized()
    quantize_(loaded.model, {"model.layers.0.self_attn.q_proj": 8}, lambda name: None)
    config = exported(loaded, tmp_path / "hf")
    with (
        pytest.raises(ValueError, match="packed-mpo, which transformers reads"),
        torch.device("meta"),
    ):
        AutoModel.from_config(config, trust_remote_code=True)


def test_tensors_of_another_shape_are_refused(folder):
    with torch.device("meta"):
        model = AutoModel.from_config(
            AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True
        )
    layer = next(module for module in model.modules() if type(module).__name__ == ServedMPO.__name__)
    with pytest.raises(ValueError, match=r"core_9 has shape .*needs no such tensor"):
        layer.load_weights([("core_9", torch.ones(2))])
    with pytest.raises(ValueError, match=r"has shape \(3,\), and the layer needs shape"):
        layer.load_weights([(layer._stored[0], torch.ones(3))])


def test_an_absent_matrix_gives_its_bias():
    assert Absent(3, None)(torch.ones(2, 5)).tolist() == [[0, 0, 0]] * 2
    assert Absent(2, torch.tensor([1.0, 2.0]))(torch.ones(1, 5)).tolist() == [[1, 2]]
    with pytest.raises(Refusal, match="has lost all"):
        Absent(2, None).load_weights([("weight", torch.ones(2, 2))])

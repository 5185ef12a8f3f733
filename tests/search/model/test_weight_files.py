"""What the weight files say is never ignored: a folder whose weights and config disagree is refused, or gives them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from search.model.loading import assemble, load_model, model_digest
from search.model.sources import locate
from search.model.streaming import StreamedModel

CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = load_model("random:tiny-llama", "cpu")
    path = tmp_path_factory.mktemp("models") / "tiny"
    loaded.model.save_pretrained(path)
    loaded.tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    path.mkdir()
    for file in saved.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def with_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_config(folder: Path, **changes: object) -> None:
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | changes))


def sharded(folder: Path, first: Callable[[Tensors], Tensors] = lambda tensors: tensors) -> dict[str, str]:
    """Split the weights into two files and return the content of their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    parts = {names[0]: dict(list(tensors.items())[:9]), names[1]: dict(list(tensors.items())[9:])}
    listed = {tensor: file for file, part in parts.items() for tensor in part}
    parts[names[0]] = first(parts[names[0]])
    for file, part in parts.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    write_index(folder, listed)
    return listed


def write_index(folder: Path, listed: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def extra(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: torch.ones(32)})


def untie(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (extra("model.layers.0.self_attn.q_proj.bias"), {}, "does not take.*q_proj.bias"),
        (lambda tensors: None, {"num_hidden_layers": 1}, r"does not take.*model\.layers\.1"),
        (extra("score.weight"), {}, "does not take.*score.weight"),
        (extra(f"{UP}_scale"), {}, "does not take.*up_proj.weight_scale"),
        (extra("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"), {}, "does not take.*lora_A"),
        (lambda tensors: tensors.update({UP.removeprefix("model."): tensors[UP] + 1}), {}, "twice, also as model"),
        (untie, {}, "ties lm_head.weight to model.embed_tokens.weight.*tie_word_embeddings to false"),
        (lambda tensors: None, {"tie_word_embeddings": False}, "lacks 1 weights.*lm_head"),
        (lambda tensors: None, {"num_hidden_layers": 4}, "lacks"),
    ],
)
def test_weights_that_the_config_contradicts_are_refused(
    folder: Path, change: Callable[[Tensors], Any], config: dict[str, object], said: str
) -> None:
    with_tensors(folder, change)
    with_config(folder, **config)
    with pytest.raises(ValueError, match=said):
        load_model(str(folder), CPU)


@pytest.mark.parametrize(
    ("change", "config"),
    [
        (lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}), {}),
        (untie, {"tie_word_embeddings": False}),
        (extra("model.layers.0.self_attn.rotary_emb.inv_freq"), {}),
    ],
)
def test_weights_that_the_config_agrees_with_are_loaded_as_they_are(
    folder: Path, change: Callable[[Tensors], Any], config: dict[str, object]
) -> None:
    with_tensors(folder, change)
    with_config(folder, **config)
    stored = load_file(folder / "model.safetensors")
    model = load_model(str(folder), CPU).model
    for name, values in model.state_dict().items():
        assert torch.equal(values, stored.get(name, stored["model.embed_tokens.weight"]))
    StreamedModel(str(folder), CPU, torch.float32)


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (extra("model.layers.0.self_attn.q_proj.bias"), {}, "does not take"),
        (lambda tensors: None, {"num_hidden_layers": 1}, r"model\.layers\.1.*does not take"),
        (untie, {}, "ties lm_head.weight to"),
    ],
)
def test_a_model_read_block_by_block_is_refused_likewise(
    folder: Path, change: Callable[[Tensors], Any], config: dict[str, object], said: str
) -> None:
    with_tensors(folder, change)
    with_config(folder, **config)
    with pytest.raises(ValueError, match=said):
        StreamedModel(str(folder), CPU, torch.float32)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("adapter_config.json", r"an adapter \(adapter_config.json\).*merge_and_unload"),
        ("adapter_model.safetensors", r"an adapter \(adapter_model.safetensors\)"),
        ("adapter_model.bin", r"an adapter \(adapter_model.bin\)"),
        ("other.safetensors", "holds other.safetensors, which is not read beside model.safetensors"),
        ("model.safetensors.index.json", "holds its weights twice"),
    ],
)
def test_weights_beside_the_model_are_refused_before_anything_is_loaded(folder: Path, file: str, said: str) -> None:
    (folder / file).write_text("{}")
    with pytest.raises(ValueError, match=said):
        locate(str(folder))


def test_an_adapter_beside_a_gguf_file_is_refused(tmp_path: Path) -> None:
    for name in ("model.gguf", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
    for name in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(ValueError, match="holds an adapter"):
            locate(str(name))


def test_a_copy_in_the_layout_of_mistral_is_not_needed(folder: Path) -> None:
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    locate(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must hold model.safetensors or .*index.json, but .* consolidated"):
        locate(str(folder))


def test_shards_are_read_and_an_index_that_does_not_match_them_is_refused(folder: Path) -> None:
    digest = load_model(str(folder), CPU).digest
    listed = sharded(folder)
    assert load_model(str(folder), CPU).digest == digest
    other = "model-00002-of-00002.safetensors"
    for wrong, said in (
        ({name: file for name, file in listed.items() if name != "model.layers.0.mlp.up_proj.weight"}, "does not list"),
        (dict.fromkeys(listed, other), "00001-of-00002.safetensors, which is not read"),
        ({**listed, "model.more": other}, "model.more in no file"),
        ({**listed, "model.more": "../x.safetensors"}, "no safetensors file beside it"),
        ({**listed, "model.more": "weights.bin"}, "no safetensors file beside it"),
        ([], "without a weight_map"),
        ({}, "without a weight_map"),
    ):
        write_index(folder, wrong)
        with pytest.raises(ValueError, match=said):
            locate(str(folder))


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    norm = "model.norm.weight"
    sharded(folder, lambda first: {**first, norm: torch.zeros(32)})
    with pytest.raises(ValueError, match=f"holds {norm} twice, in model-00001.* and in model-00002"):
        locate(str(folder))


def test_shared_parameters_of_another_architecture_are_refused(folder: Path) -> None:
    loaded = load_model(str(folder), CPU)
    parameters = {name: values.detach() for name, values in loaded.model.named_parameters()}
    assert model_digest(assemble(str(folder), CPU, parameters, loaded.digest).model) == loaded.digest
    with pytest.raises(ValueError, match=r"another architecture.*model\.more"):
        assemble(str(folder), CPU, {**parameters, "model.more": torch.zeros(1)}, loaded.digest)
    del parameters["model.norm.weight"]
    with pytest.raises(ValueError, match=r"another architecture.*model\.norm"):
        assemble(str(folder), CPU, parameters, loaded.digest)

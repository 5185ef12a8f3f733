"""Folders of integers: their layouts, and what mlx-lm and transformers compute with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import needs_mlx, run_mlx
from merging_tokenizer import merging_tokenizer
from model_folder import wide_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.tiny_folders import answers
from compression.layers.packed import PackedEmbedding, PackedLinear, PackedMatrix
from compression.numerics.group_integers import quantize
from compression.refusal import Refusal
from search.export import folder as writing
from search.export.folder import check_export, export_integers
from search.export.integers import integer_model, rounded_matrices, stands_for
from search.model.loading import load_model

PROMPTS = [[10, 20, 30, 40, 50], list(range(60, 90))]
EVERY = (8, 6, 5, 4, 3, 2, 16)


def packed(weight: torch.Tensor, bits: int, group: int = 64) -> PackedMatrix:
    return PackedMatrix(quantize(weight.float(), bits, group), weight.shape[1], bits, group, torch.float16)


def cast_(model: Any, dtype: torch.dtype) -> Any:
    """Give the parameters of a model another type; not the frequencies of its positions, as `model.half()` does."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, PackedMatrix):
            module.like = module.like.to(dtype)
    return model


def every_bits(number: int, name: str) -> int:
    return EVERY[number % len(EVERY)]


def alike(number: int, name: str) -> int:
    """Bits that are the same in matrices that read the same."""
    leaf = name.rpartition(".")[2]
    return {"o_proj": 8, "down_proj": 4}.get(leaf, 4 if leaf in ("q_proj", "k_proj", "v_proj") else 16)


def round_(model: Any, bits_of: Callable[[int, str], int] = every_bits, embedding: int = 16, group: int = 64) -> Any:
    """Round the linear layers of a model in place, and its other parameters to float16; 16 leaves one as it is."""
    cast_(model, torch.float16)
    layers = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.Linear) and name != "lm_head"]
    for number, (name, layer) in enumerate(layers):
        if (bits := bits_of(number, name)) < 16 and layer.in_features % group == 0:
            model.set_submodule(name, PackedLinear(packed(layer.weight, bits, group), layer.bias))
    if embedding < 16:
        table = packed(model.model.embed_tokens.weight, embedding)
        model.model.embed_tokens = PackedEmbedding(table)
        if model.config.tie_word_embeddings:
            model.lm_head = PackedLinear(table, None, "model.embed_tokens")
    return model


@pytest.mark.parametrize(("kind", "bits_of"), [("mlx", every_bits), ("compressed-tensors", alike)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_stored_integers_stand_for_the_rounded_matrices(
    kind: str, bits_of: Callable[[int, str], int], tied: bool
) -> None:
    model = round_(wide_model(tie_word_embeddings=tied), bits_of, 6 if kind == "mlx" else 16)
    small, settings = integer_model(model, kind)
    matrices = rounded_matrices(model)
    assert "model.embed_tokens" in matrices if kind == "mlx" else len(matrices) > 8
    for name, matrix in matrices.items():
        tensors = {key: values.clone() for key, values in small.get_submodule(name).named_buffers()}
        assert stands_for(kind, tensors, matrix)
        words = next(values for key, values in tensors.items() if key in ("weight", "weight_packed"))
        words.view(torch.int32)[-1, -1] ^= 1
        assert not stands_for(kind, tensors, matrix)
        bits = matrix.columns * matrix.bits
        assert words.shape == (len(matrix.codes), -(-bits // 32))
    if kind == "mlx":
        stated = settings["quantization"]
        assert isinstance(stated, dict)
        assert {name for name, each in stated.items() if isinstance(each, dict)} == set(matrices)
    else:
        stated = settings["quantization_config"]
        assert isinstance(stated, dict)
        targets = {
            name: group["weights"]["num_bits"]
            for group in stated["config_groups"].values()
            for name in group["targets"]
        }
        assert targets == {name: matrix.bits for name, matrix in matrices.items()}
    assert isinstance(model.get_submodule(next(iter(matrices))), PackedLinear | PackedEmbedding)  # as it was


@needs_mlx
@pytest.mark.slow
def test_mlx_computes_with_every_number_of_bits(tmp_path: Path) -> None:
    made = {
        "tied": round_(wide_model(), embedding=6),
        "tied, 16": round_(wide_model(), embedding=16),
        "untied": round_(wide_model(tie_word_embeddings=False), embedding=3),
        "biases": round_(wide_model("random:tiny-qwen2"), embedding=5),
    }
    folders = [tmp_path / name for name in made]
    for model, folder in zip(made.values(), folders, strict=True):
        export_integers(model, merging_tokenizer(), folder, "mlx")
    for folder, model, found in zip(folders, made.values(), run_mlx(folders, PROMPTS), strict=True):
        expected = answers(cast_(model, torch.float32), PROMPTS)
        for one, other in zip(found, expected, strict=True):
            assert one["first"] == pytest.approx(other["first"], abs=1e-3), folder.name
            assert one["tokens"] == other["tokens"], folder.name


@pytest.mark.slow
def test_transformers_computes_with_compressed_tensors(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    ids = torch.tensor([PROMPTS[0]])
    for number, (bits_of, name, tied) in enumerate(((alike, "llama", True), (alike, "qwen2", False))):
        model = round_(wide_model(f"random:tiny-{name}", tie_word_embeddings=tied), bits_of)
        folder = tmp_path / str(number)
        export_integers(model, merging_tokenizer(), folder, "compressed-tensors")
        found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(found(ids).logits, cast_(model, torch.float32)(ids).logits, atol=0.01, rtol=0.01)


def test_what_an_engine_cannot_hold_is_named(tmp_path: Path) -> None:
    def error(model: Any, kind: str) -> str:
        with pytest.raises(Refusal) as caught:
            export_integers(model, merging_tokenizer(), tmp_path / "new", kind)
        assert not (tmp_path / "new").exists()
        return str(caught.value)

    different = round_(wide_model(), lambda number, name: 8 if name.endswith("q_proj") else 4)
    assert "model.layers.0.self_attn has q_proj 8, k_proj 4, v_proj 4; search with --serve vllm" in error(
        different, "compressed-tensors"
    )
    partly = round_(wide_model(), lambda number, name: 16 if name.endswith("up_proj") else 4)
    assert "model.layers.0.mlp has gate_proj 4, up_proj 16" in error(partly, "compressed-tensors")
    odd = round_(wide_model(), lambda number, name: 5)
    assert "64 columns in 5 bits and groups of 64, and vllm takes 8 or 4 bits" in error(odd, "compressed-tensors")
    assert "and mlx-lm takes 8, 6, 5, 4, 3 or 2 bits in groups of 64" in error(round_(wide_model(), group=32), "mlx")
    assert "none is; use --format plain" in error(wide_model().half(), "mlx")
    other = load_model("random:tiny-gpt2", "cpu")
    with pytest.raises(
        Refusal, match="rounded matrices in the format mlx need a Llama-like model, and GPT2LMHeadModel"
    ):
        check_export("mlx", other.model, other.tokenizer)


@pytest.mark.parametrize("lost", [False, True])
def test_a_folder_with_other_tensors_is_not_written(
    lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = writing._save_plain

    def damaged(small: Any, tokenizer: Any, folder: Path, card: str, beside: Any) -> None:
        matrix = small.model.layers[0].self_attn.q_proj
        scales = matrix.scales
        if lost:
            del matrix.scales
        else:
            scales[0, 0] += 1
        save(small, tokenizer, folder, card, beside)
        matrix.register_buffer("scales", scales)

    monkeypatch.setattr(writing, "_save_plain", damaged)
    with pytest.raises(Refusal, match=r"was written wrongly: model\.layers\.0\.self_attn\.q_proj.* differs"):
        export_integers(round_(wide_model()), merging_tokenizer(), tmp_path / "new", "mlx")
    assert not (tmp_path / "new").exists()


def test_settings_are_beside_the_integers(tmp_path: Path) -> None:
    export_integers(round_(wide_model()), merging_tokenizer(), tmp_path / "new", "mlx")
    settings = json.loads((tmp_path / "new" / "config.json").read_text())
    assert settings["quantization"]["model.layers.0.self_attn.q_proj"] == {"group_size": 64, "bits": 8}
    assert settings["quantization"]["lm_head"] is False
    assert settings["dtype"] == "float16"
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == torch.uint32

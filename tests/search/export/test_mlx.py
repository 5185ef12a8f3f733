"""Plain folders in mlx-lm, which computes on the processor here: its tokens and log-probabilities are ours."""

import json

import pytest
from cut_shapes import ALIKE, NO_ATTENTION, ONE_HEAD_LESS, cut_to, with_biases_
from engines import needs_mlx, run_mlx

from benchmarks.tiny_folders import answers
from search.export.folder import export_dense_, export_plain
from search.model.loading import load_model

pytestmark = [needs_mlx, pytest.mark.slow]
PROMPTS = [[10, 20, 30, 40, 50], list(range(60, 90))]
ROTATION = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
"""A base and a scaling that show in short prompts."""


def turned_(model, rotation):
    model.config.rope_parameters = dict(rotation)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


def written(loaded, folder, write=export_plain):
    """What a model answers after `PROMPTS`; its folder is written."""
    expected = answers(loaded.model, PROMPTS)
    write(loaded.model, loaded.tokenizer, folder)
    return expected


def settings(folder):
    return json.loads((folder / "config.json").read_text())


def test_plain_and_dense_folders_give_our_tokens(tmp_path):
    folders = [tmp_path / name for name in ("no attention", "biases", "alike", "another base", "linear", "dense")]
    without = cut_to("random:tiny-qwen2", NO_ATTENTION, untied=True)
    shapes = (ONE_HEAD_LESS, ALIKE, ALIKE, ONE_HEAD_LESS)
    biased, alike, based, linear = (cut_to("random:tiny-llama", shape) for shape in shapes)
    dense = load_model("random:tiny-llama", "cpu")
    with_biases_(biased.model)
    for loaded in (without, biased, alike, dense):
        turned_(loaded.model, ROTATION)
    turned_(based.model, {"rope_type": "default", "rope_theta": 500.0})
    turned_(linear.model, {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0})
    models = (without, biased, alike, based, linear)
    plain = [written(loaded, folder) for loaded, folder in zip(models, folders[:5], strict=True)]
    expected = [*plain, written(dense, folders[5], export_dense_)]
    blocks = settings(folders[0])["block_configs"]
    assert [block["attention"]["no_op"] for block in blocks] == [False, True, False]
    own = [settings(folder).get("model_file") for folder in folders]
    assert own == [*["modeling_mlx.py"] * 2, None, None, "modeling_mlx.py", None]
    assert settings(folders[5])["rope_parameters"] == ROTATION
    for folder, found, ours in zip(folders, run_mlx(folders, PROMPTS), expected, strict=True):
        for one, other in zip(found, ours, strict=True):
            assert one["tokens"] == other["tokens"], folder.name
            assert one["first"] == pytest.approx(other["first"], abs=1e-3), folder.name

"""Whole runs on models of other kinds than causal ones, and on fused matrices, up to an export loaded afresh."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from encoders import LABELS, encoder_folder
from fake_data import fake_data, jsonl
from image_text import image_text_folder
from small_run import words
from tiny_model import assert_same_logits

from compression.layers.fused import FusedLinear
from search import cli
from search.export.restore import restore
from search.model.random_models import byte_tokenizer
from search.runtime.console import Console

__all__ = ["fake_data"]
pytestmark = pytest.mark.usefixtures("fake_data")


def fused_folder(folder: Path) -> Path:
    """Write a Phi-3 model, whose q, k and v are one matrix, and gate and up another."""
    config = transformers.Phi3Config(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Phi3ForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def reviews(path: Path) -> Path:
    """Labelled texts for `encoders.LABELS`."""
    return jsonl(
        path,
        [{"text": f"Film {n} was {('dull', 'fine', 'both')[n % 3]}.", "label": LABELS[n % 3]} for n in range(40)],
    )


RUNS: dict[str, tuple[Callable[[Path], Path], str, dict[str, object], list[str]]] = {
    "image-text": (lambda folder: image_text_folder(folder, "gemma3"), "AutoModelForImageTextToText", {}, []),
    "fused": (fused_folder, "AutoModelForCausalLM", {}, ["--split-fused"]),
    "encoder": (lambda folder: encoder_folder(folder, "bert"), "AutoModelForMaskedLM", {"benchmark_items": 2}, []),
    "classifier": (
        lambda folder: encoder_folder(folder, "modernbert", classifies=True),
        "AutoModelForSequenceClassification",
        {"heal_minutes": 0},
        [],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_ends_with_an_export_of_the_original_class(kind: str, tmp_path: Path) -> None:
    write, auto, changes, flags = RUNS[kind]
    model, run = write(tmp_path / "model"), tmp_path / "run"
    fields: dict[str, Any] = {
        "agent": "lagrangian",
        "budget": 2,
        "repair_tokens": 512,
        "heal_minutes": 0.002,
        **changes,
    }
    if kind == "classifier":
        fields["proxy"] = reviews(tmp_path / "reviews.jsonl")
    assert cli.main([*words(model=model, out=run, **fields), *flags]) == cli.DONE
    rows = {row["schedule"]: row for row in json.loads((run / "summary.json").read_text())["rows"]}
    assert rows["dense"]["kl"] == pytest.approx(0, abs=1e-6)
    assert 0 < rows["lagrangian"]["kl"] < rows["uniform-plain"]["kl"]
    assert (rows["dense"]["items"] > 0) == (kind != "encoder")
    assert (rows["dense"]["perplexity"] is None) == (kind == "classifier")
    assert not (run / "benchmarks.csv").exists()
    out = tmp_path / "out"
    assert cli.main(["export", str(run), "--dtype", "float32", "--out", str(out), "--quiet"]) == cli.DONE
    read = getattr(transformers, auto).from_pretrained(out, dtype=torch.float32)
    assert type(read) is type(getattr(transformers, auto).from_pretrained(model))
    restored = restore(run, Console(quiet=True), "cpu")
    assert restored.state == ("repaired" if kind == "classifier" else "healed")
    assert any(isinstance(module, FusedLinear) for module in read.modules()) == (kind == "fused")
    if kind == "fused":
        assert {"q", "k", "v", "gate", "up", "down", "o"} == {site.family for site in restored.experiment.sites}
    ids = torch.arange(1, 41).reshape(2, 20)
    with torch.no_grad():
        found, expected = (each(input_ids=ids).logits for each in (read, restored.experiment.loaded.model))
    assert math.isfinite(float(found.sum()))
    assert_same_logits(found, expected)


def test_a_classifier_needs_labelled_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = encoder_folder(tmp_path / "model", "bert", classifies=True)
    assert cli.main(words(model=model, out=tmp_path / "run")) == cli.REFUSED
    assert "a label must be one of bad, good, mixed or a number below 3" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_classifier_is_not_healed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, proxy = encoder_folder(tmp_path / "model", "bert", classifies=True), reviews(tmp_path / "reviews.jsonl")
    assert cli.main(words(model=model, out=tmp_path / "run", proxy=proxy, heal_minutes=1)) == cli.REFUSED
    assert "is a BertForSequenceClassification; use heal_minutes 0" in capsys.readouterr().err


def test_only_fused_matrices_are_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words(out=tmp_path / "run"), "--split-fused"]) == cli.REFUSED
    assert "split_fused needs matrices of several parts" in capsys.readouterr().err

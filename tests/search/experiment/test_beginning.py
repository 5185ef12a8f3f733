"""Whatever a run scores or learns from begins as the tokenizer begins a text."""

from __future__ import annotations

import pytest
import torch
from fake_data import fake_data
from small_run import SMALL
from tiny_model import with_beginning

from compression.sites import discover_sites
from search.config import Config
from search.experiment.calibration import calibration_batches
from search.experiment.experiment import Experiment, Extract
from search.healing.text import heal_text
from search.model.loading import LoadedModel, load_model

__all__ = ["fake_data"]

BEGINNING = 256


@pytest.fixture
def begun(fake_data: object) -> Experiment:
    return opened(with_beginning(load_model("random:tiny-llama", "cpu")))


def opened(loaded: LoadedModel) -> Experiment:
    return Experiment.of(Config.of(SMALL), loaded, discover_sites(loaded.model), torch.device("cpu"))


def test_only_a_tokenizer_that_puts_tokens_before_a_text_has_a_beginning() -> None:
    loaded = load_model("random:tiny-llama", "cpu")
    assert loaded.beginning == ()
    assert loaded.encode_whole("ab") == loaded.encode("ab")
    loaded = with_beginning(load_model("random:tiny-llama", "cpu"))
    assert loaded.beginning == (BEGINNING,)
    assert loaded.encode("ab") == loaded.encode_whole("ab")[1:]
    assert loaded.encode_whole("ab") == loaded.tokenizer("ab")["input_ids"]
    assert loaded.encode_whole("<|endoftext|>ab") == [BEGINNING, *loaded.encode("ab")]  # not twice


def test_trials_selection_table_and_profiles_score_after_the_beginning(begun: Experiment) -> None:
    parts = [shard for part in ("search", "selection", "heldout") for shard in begun.shards(part)]
    parts += [begun.extract(Extract(300)), begun.extract(Extract(0, context=40))]
    for sequences in parts:
        assert sequences
        assert all(sequence.tokens[0] == BEGINNING for sequence in sequences)
        assert all(sequence.tokens.count(BEGINNING) == 1 for sequence in sequences)


def test_statistics_are_collected_after_the_beginning_and_under_another_key(begun: Experiment) -> None:
    for ids, mask in calibration_batches(begun.loaded, begun.splits.calibration, 0):
        assert (ids[:, 0] == BEGINNING).all()
        assert (ids[:, 1:][mask[:, 1:]] < BEGINNING).all()
    plain = opened(load_model("random:tiny-llama", "cpu"))
    assert plain.calibration.key != begun.calibration.key
    assert plain.identity != begun.identity


@pytest.mark.parametrize("source", ["text", "sampled", "text+sampled"])
def test_healing_learns_from_rows_with_the_beginning(begun: Experiment, source: str) -> None:
    rows = heal_text(begun.loaded, source, 24, 0, 1500)
    assert (rows.tokens[:, 0] == BEGINNING).all()
    assert rows.tokens.shape[1] == 24
    assert not rows.wanted[:, -1].any()
    assert rows.wanted[:, 0].any()  # the first token of a text is predicted from the beginning

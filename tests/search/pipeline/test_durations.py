"""Times by stage: those of a logged run within 30 %, none for what is not done, and in proportion to the work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compression import discover_sites
from search.config import Config
from search.model.kinds import Kind
from search.pipeline.durations import Speeds, durations, measured_speeds

# Seconds of the stages over half a minute of `python search.py --quick` at commit bbb7e63aaa7d on 2026-11-29, on 2 idle
# cores of AMD EPYC, and its tokens. The speeds are twice those of one thread there, by its processor time a day later.
LOGGED = {
    "calibrate": 60,
    "weight tokens": 87,
    "decompose": 140,
    "baselines": 81,
    "reference": 36,
    "search": 56,
    "select": 43,  # 54 with six finalists and the two that are always scored; now there are four
    "measure": 89,
    "repair": 191,
    "heal": 91,
    "time": 57,
    "benchmark": 70,
}
SPEEDS = Speeds(token=0.0024, operation=6.7e-12)
TOKENS = {"trial": 501, "selection": 1728, "heldout": 2973}


def experiment(is_cached: bool = False, by_block: bool = False, blocks: int = 30, **fields: Any) -> Any:
    """An experiment on a model of the default model's shape, without weights or data."""
    shape = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(shape)
    config = Config.of({"quick": True, **fields})
    calibration = SimpleNamespace(is_cached=is_cached, by_block=by_block)
    return SimpleNamespace(
        config=config,
        device=torch.device("cpu"),
        loaded=SimpleNamespace(model=model, kind=Kind.CAUSAL),
        sites=discover_sites(model, shapes_only=True),
        calibration=calibration,
        splits=SimpleNamespace(calibration=SimpleNamespace(tokens=config.calibration_tokens)),
        references=lambda anchor: 2 * config.search_shards,
        seconds_per_token=lambda: SPEEDS.token,
    )


def test_stages_of_a_logged_run_are_estimated_within_30_percent() -> None:
    found = durations(experiment(), SPEEDS, TOKENS)
    assert {stage: found[stage] for stage in LOGGED} == pytest.approx(LOGGED, rel=0.3)
    assert sum(found.values()) == pytest.approx(18 * 60 + 49, rel=0.1)


def test_what_is_not_done_takes_no_time() -> None:
    cached = durations(experiment(is_cached=True), SPEEDS, TOKENS)
    assert (cached["calibrate"], cached["weight tokens"]) == (0, 0)
    short = experiment(repair_tokens=0, heal_minutes=0, benchmark_items=0, export="none", budget=0)
    found = durations(short, SPEEDS, TOKENS)
    assert [found[stage] for stage in ("repair", "heal", "benchmark", "write", "search")] == [0] * 5


def test_both_passes_by_block_are_one_stage_and_nothing_is_decomposed_before_it_is_scored() -> None:
    whole, by_block = (durations(experiment(by_block=each), SPEEDS, TOKENS) for each in (False, True))
    collected = whole["calibrate"] + whole["weight tokens"]
    assert collected < by_block["calibrate"] < 1.5 * collected  # moments are rounded and stored
    assert (by_block["weight tokens"], by_block["baselines"]) == (0, 0)
    moved = by_block["select"] + by_block["measure"] - whole["select"] - whole["measure"]
    assert whole["baselines"] < moved < 1.5 * whole["baselines"]


def test_times_are_in_proportion_to_speeds_blocks_tokens_and_minutes() -> None:
    once = durations(experiment(), SPEEDS, TOKENS)
    slow = durations(experiment(), Speeds(2 * SPEEDS.token, 2 * SPEEDS.operation), TOKENS)
    for stage in ("calibrate", "decompose", "reference", "search", "select", "measure", "repair", "time", "benchmark"):
        assert slow[stage] == pytest.approx(2 * once[stage])
    twice = durations(experiment(blocks=60), SPEEDS, TOKENS)
    for stage in ("decompose", "baselines"):
        assert twice[stage] == pytest.approx(2 * once[stage])
    longer = durations(experiment(calibration_tokens=8192), SPEEDS, TOKENS)
    assert longer["calibrate"] == pytest.approx(2 * once["calibrate"])
    healed = durations(experiment(heal_minutes=3), SPEEDS, TOKENS)
    assert healed["heal"] - once["heal"] == pytest.approx(120)


def test_the_speed_of_products_is_measured() -> None:
    speeds = measured_speeds(experiment())
    assert speeds.token == SPEEDS.token
    assert 1e-15 < speeds.operation < 1e-8

"""Rows are shared only where that changes nothing: otherwise every text and every answer has a row of its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.zoo_models import make_model
from search.benchmarking.generation import generate
from search.evaluation import shared_rows
from search.evaluation.packed_sequences import Packed, packed_text
from search.evaluation.shared_rows import keeps_rows_apart, shares_rows
from search.evaluation.workload import Workload
from search.model.loading import load_model
from search.runtime import remembered

# A convolution, recurrent states, windows of 64 positions or places, and a bias for positions that takes no mask.
ODD = ["lfm2", "falcon_h1", "mistral-window", "gemma2", "gpt_neo", "bloom"]
TEXT = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(0)).tolist()


def item(start: int) -> Packed:
    """An item of 12 tokens and answers of 3 and 4, the second of which is scored from its second token on."""
    return Packed(tuple(TEXT[start : start + 19]), 12, ((12, 15, 12), (15, 19, 16)), 1)


def direct(model: Any, tokens: list[int], first: int) -> float:
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
    return sum(float(logs[at - 1, tokens[at]]) for at in range(first, len(tokens)))


@pytest.mark.parametrize("name", ODD)
def test_items_and_texts_are_scored_as_by_plain_passes(name: str) -> None:
    model, items = make_model(name), [item(start) for start in (0, 20, 40)]
    found = Workload([*items, packed_text(TEXT)], model, 200).continuations(model)
    for scores, one in zip(found, items, strict=True):
        prefix = list(one.tokens[:12])
        wanted = [
            direct(model, prefix + list(one.tokens[start:stop]), 12 + first - start)
            for start, stop, first in one.branches
        ]
        assert [each.loglikelihood for each in scores] == pytest.approx(wanted, abs=1e-3)
    quality = Workload([*items, packed_text(TEXT)], model).reference(model)
    assert quality.perplexity == pytest.approx(math.exp(-direct(model, TEXT, 1) / 99), rel=1e-4)
    assert quality.tokens == 99 + 3 * (11 + 4)
    assert keeps_rows_apart(model)


def test_answers_far_from_their_prefix_see_all_of_it() -> None:
    """Every text is within the window of 64, but in a shared row the last answer stands 85 places after the prefix."""
    model, branches = make_model("gpt_neo"), [(start, start + 15, start) for start in range(40, 100, 15)]
    [scores] = Workload([Packed(tuple(TEXT), 40, tuple(branches), 0)], model).continuations(model)
    wanted = [direct(model, TEXT[:40] + TEXT[start:stop], 40) for start, stop, _ in branches]
    assert [each.loglikelihood for each in scores] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("name", ["lfm2", "mamba2"])  # the second has another argument for its cache
def test_prompts_of_a_model_with_a_convolution_are_continued_as_alone(name: str) -> None:
    model, prompts = make_model(name), [TEXT[:9], TEXT[20:26]]
    together = generate(model, prompts, 5, lambda written: False)
    for prompt, written in zip(prompts, together, strict=True):
        tokens = list(prompt)
        for _ in range(5):
            tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        assert written == tokens[len(prompt) :]


def test_texts_within_the_window_share_rows_and_longer_ones_do_not() -> None:
    model = make_model("mistral-window")
    assert shares_rows(model, TEXT[:50])
    assert not keeps_rows_apart(model)
    assert not shares_rows(model, TEXT)
    assert shares_rows(model, TEXT[:50])


def test_a_model_is_tested_once_for_texts_of_a_length() -> None:
    model, passes = make_model("llama"), []
    model.register_forward_hook(lambda *call: passes.append(1))
    assert shares_rows(model, TEXT)
    count = len(passes)
    assert shares_rows(model, TEXT[:40])
    assert shares_rows(model, TEXT[::-1])
    assert 0 < count == len(passes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_does_not_keep_rows_apart(dtype: torch.dtype) -> None:
    assert shares_rows(make_model("llama").to(dtype), TEXT)


def test_a_row_of_its_own_for_every_answer_gives_the_figures_of_shared_rows() -> None:
    model = load_model("random:tiny-llama", "cpu").model
    sequences = [item(0), packed_text(TEXT[:60]), item(30), item(60)]
    shared, plain = (Workload(sequences, model, 60) for _ in range(2))
    plain._shared, plain._batches = False, []
    plain._batches = plain._batched(60)
    found, expected = plain.reference(model), shared.reference(model)
    for name, value in expected.scalars().items():
        if isinstance(value, float):
            assert getattr(found, name) == pytest.approx(value, abs=1e-4, rel=1e-3), name
    assert found.tokens_by_sequence == expected.tokens_by_sequence


def test_an_item_counts_once_all_its_answers_are_scored() -> None:
    model = make_model("lfm2")
    workload = Workload([item(start) for start in (0, 20, 40, 60)], model, 1)
    whole, seen = workload.reference(model), []
    workload.measure(model, should_stop=lambda quality, checks: seen.append(quality) or False)
    assert {quality.items for quality in seen} == {0, 1, 2, 3}
    for quality in seen:
        assert set(quality.correct_by_item) <= set(whole.correct_by_item)


def test_the_result_is_remembered_for_the_same_model_and_row_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CHISEL_CACHE", str(tmp_path))
    monkeypatch.setattr(remembered, "_SLOW", 0.0)
    tested: list[int] = []
    test = shared_rows._same_apart

    def noted(model: Any, tokens: list[int], length: int) -> bool:
        tested.append(length)
        return test(model, tokens, length)

    monkeypatch.setattr(shared_rows, "_same_apart", noted)
    for name, shares in (("llama", True), ("gpt_neo", False)):
        tested.clear()
        for _ in range(2):  # two processes, as far as the model can tell
            assert shares_rows(make_model(name), TEXT, identity={"weights": name}) is shares
        assert tested == [100]
        shares_rows(make_model(name), TEXT[:99], identity={"weights": name})
        shares_rows(make_model(name), TEXT, 120, identity={"weights": name})
        shares_rows(make_model(name), TEXT, identity={"weights": "another"})
        shares_rows(make_model(name).to(torch.bfloat16), TEXT, identity={"weights": name})
        shares_rows(make_model(name), TEXT)
        assert tested == [100, 99, 120, 100, 100, 100]

"""Generation: side by side in one row, prompts are continued as they are alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from search.benchmarking.generation import NonFinite, generate
from search.model.kv_cache import keep_positions
from search.model.loading import LoadedModel, load_model

SHARED = list(b"Q: what is it?\nA: it is a cow.\n\n")
PROMPTS = [
    SHARED + list(text) for text in (b"Q: and this?\nA:", b"Q: that\nA:", b"Q: which one of them all?\nA:", b"Q")
]


def alone(loaded: LoadedModel, prompt: Sequence[int], most: int) -> list[int]:
    """What transformers' own greedy generation appends."""
    ids = torch.tensor([list(prompt)])
    out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False)
    return [int(token) for token in out[0, len(prompt) :]]


@pytest.mark.parametrize("name", ["random:tiny-llama", "random:tiny-gpt2", "random:tiny-qwen2"])
@pytest.mark.parametrize("prompts", [PROMPTS, [list(b"one"), list(b"another one")], [list(b"x")]])
def test_prompts_in_a_row_are_continued_as_alone(name: str, prompts: list[list[int]]) -> None:
    loaded = load_model(name, "cpu")
    end = loaded.tokenizer.eos_token_id
    written = generate(loaded.model, prompts, 12, lambda new: new[-1] == end)
    assert written == [alone(loaded, prompt, 12) for prompt in prompts]


def test_a_prompt_that_has_ended_leaves_the_others_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = []

    def keep(cache: Any, kept: torch.Tensor) -> None:
        dropped.append(len(kept))
        keep_positions(cache, kept)

    monkeypatch.setattr("search.benchmarking.generation.keep_positions", keep)
    monkeypatch.setattr("search.benchmarking.generation._WANTED", 1.0)
    loaded = load_model("random:tiny-llama", "cpu")
    free = generate(loaded.model, PROMPTS, 10, lambda new: False)
    stop = free[0][2]
    stopped = generate(loaded.model, PROMPTS, 10, lambda new: new[-1] == stop)
    assert dropped  # what some have left, while others go on
    for whole, part in zip(free, stopped, strict=True):
        assert part == whole[: whole.index(stop) + 1] if stop in whole else part == whole
    assert len(stopped[0]) <= 3


def test_the_next_prompt_takes_the_place_of_one_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model("random:tiny-llama", "cpu")
    whole = generate(loaded.model, PROMPTS, 8, lambda new: False)
    stop = whole[0][1]
    told: list[int] = []
    monkeypatch.setattr("search.benchmarking.generation._ROW_PROMPTS", 2)
    monkeypatch.setattr("search.benchmarking.generation._PASS_TOKENS", 20)
    written = generate(loaded.model, PROMPTS, 8, lambda new: new[-1] == stop, told.append)
    assert written == [one[: one.index(stop) + 1] if stop in one else one for one in whole]
    assert sum(told) == len(PROMPTS)
    monkeypatch.setattr("search.benchmarking.generation._ROW_PROMPTS", 1)
    unlike = [list(b"one"), list(b"another one"), list(b"which")]
    assert generate(loaded.model, unlike, 5, lambda new: False) == [
        generate(loaded.model, [prompt], 5, lambda new: False)[0] for prompt in unlike
    ]


def test_sliding_windows_are_kept() -> None:
    loaded = load_model("random:tiny-qwen2", "cpu")
    config = loaded.model.config
    config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    config.sliding_window = 8
    loaded.model.model.has_sliding_layers = True
    for number in (0, 2):
        loaded.model.model.layers[number].self_attn.sliding_window = 8
    end = loaded.tokenizer.eos_token_id
    written = generate(loaded.model, PROMPTS, 6, lambda new: new[-1] == end)
    assert written == [alone(loaded, prompt, 6) for prompt in PROMPTS]


def test_numbers_that_are_not_finite_are_no_answer() -> None:
    loaded = load_model("random:tiny-llama", "cpu")
    with torch.no_grad():
        loaded.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFinite):
        generate(loaded.model, PROMPTS, 3, lambda new: False)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        generate(load_model("random:tiny-llama", "cpu").model, [[1], []], 3, lambda new: False)

"""Scoring against direct computation: shared prefixes, padding and batching change nothing; NaN is never a number."""

import copy
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from search.evaluation import logits
from search.evaluation.packed_sequences import group, mix, pack, packed_item, packed_text
from search.evaluation.quality import Quality, paired_kl
from search.evaluation.workload import Workload, loglikelihoods
from search.model.loading import LoadedModel, load_model

ITEMS = [
    ("Question: What is the capital of France?\nAnswer:", (" Paris", " London", " a small town", " Rome"), 0),
    ("Question: 2 + 2 = ?\nAnswer:", (" 3", " 4", " twenty-two", " 5"), 1),
    ("Which is longest?", (" a", " a much longer answer than that"), 1),
]
TEXTS = ["The quick brown fox jumps over the lazy dog. " * 3, "Bond dimensions, measured."]
NOVEL = "It was a dark and stormy night, and nobody had read of it before."


@pytest.fixture(
    scope="module", params=["random:tiny-llama", "random:tiny-gpt2", "random:tiny-qwen2", "random:tiny-gemma2"]
)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return load_model(request.param, "cpu")


def sequences(loaded: LoadedModel) -> list[Any]:
    items = [packed_item(loaded.encode, *item) for item in ITEMS]
    return items + [packed_text(loaded.encode(text)) for text in TEXTS]


def direct_loglikelihood(loaded: LoadedModel, context: str, continuation: str) -> float:
    start, whole = len(loaded.encode(context)), loaded.encode(context + continuation)
    with torch.inference_mode():
        log_probability = loaded.model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(log_probability[at - 1, whole[at]]) for at in range(start, len(whole)))


@pytest.mark.parametrize("batch_tokens", [1, 100, 4096])
def test_shared_prefix_gives_the_same_loglikelihoods_as_one_pass_per_choice(
    loaded: LoadedModel, batch_tokens: int
) -> None:
    packed = [packed_item(loaded.encode, *item) for item in ITEMS]
    for got, (context, continuations, _) in zip(loglikelihoods(loaded.model, packed, batch_tokens), ITEMS, strict=True):
        want = [direct_loglikelihood(loaded, context, continuation) for continuation in continuations]
        assert got == pytest.approx(want, abs=1e-3)


def test_the_dense_model_has_no_divergence_from_itself(loaded: LoadedModel) -> None:
    quality = Workload(sequences(loaded), loaded.model).reference(loaded.model)
    assert quality.kl == pytest.approx(0, abs=1e-5)
    assert quality.agreement == 1
    assert quality.items == 3
    assert quality.state == "ok"


def test_kl_and_perplexity_equal_a_direct_computation() -> None:
    loaded = load_model("random:tiny-llama", "cpu")
    tokens = loaded.encode(TEXTS[0])
    workload = Workload([packed_text(tokens)], loaded.model)
    workload.reference(loaded.model)
    ids = torch.tensor([tokens])
    before = loaded.model(ids).logits[0].log_softmax(-1)[:-1]
    with torch.no_grad():
        loaded.model.model.layers[1].mlp.down_proj.weight.mul_(0.3)
    after = loaded.model(ids).logits[0].log_softmax(-1)[:-1]
    quality = workload.measure(loaded.model)
    assert quality.kl == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-3)
    nll = -float(after.gather(1, ids[0, 1:, None]).mean())
    assert quality.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    assert quality.agreement == pytest.approx(float((before.argmax(-1) == after.argmax(-1)).float().mean()))
    assert quality.tokens == len(tokens) - 1


def test_the_kl_of_an_item_counts_the_question_and_the_correct_answer_but_no_instruction(loaded: LoadedModel) -> None:
    instruction, (context, continuations, answer) = "The following are questions (with answers).\n\n", ITEMS[1]
    told = packed_item(loaded.encode, instruction + context, continuations, answer, instruction)
    assert told.uncounted == len(loaded.encode(instruction))
    workloads = [
        Workload([told] + [packed_text(loaded.encode(text)) for text in some], loaded.model) for some in ([], TEXTS)
    ]
    for workload in workloads:
        workload.reference(loaded.model)
    ids = torch.tensor([loaded.encode(instruction + context + continuations[answer])])
    with torch.no_grad():
        before = loaded.model(ids).logits[0].log_softmax(-1)
        changed = copy.deepcopy(loaded.model)
        for parameter in changed.parameters():
            parameter.mul_(1.1)
        after = changed(ids).logits[0].log_softmax(-1)
    wanted = (before.exp() * (before - after)).sum(-1)[told.uncounted - 1 : -1]
    for workload in workloads:
        quality = workload.measure(changed)
        assert quality.kl_by_sequence[0] == pytest.approx(float(wanted.sum()), rel=1e-3)
        assert quality.tokens_by_sequence[0] == len(wanted) == ids.shape[1] - told.uncounted
        assert quality.items == 1


def test_every_corpus_has_the_figures_it_has_alone_and_one_that_is_aside_has_no_others(loaded: LoadedModel) -> None:
    texts = [("prose", TEXTS[0]), ("exam", TEXTS[1]), ("prose", TEXTS[1]), ("unseen", NOVEL)]
    packed = [replace(packed_text(loaded.encode(text), name), aside=name == "unseen") for name, text in texts]
    parts = [[replace(one, aside=False) for one in packed if one.corpus == name] for name in ("prose", "exam")]
    parts.append([replace(packed[3], aside=False)])
    workloads = [Workload(some, loaded.model) for some in (packed, packed[:3], *parts, [packed_text(packed[0].tokens)])]
    for workload in workloads:
        workload.reference(loaded.model)
    changed = copy.deepcopy(loaded.model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.1)
    whole, counted, *alone, nameless = [workload.measure(changed) for workload in workloads]
    assert [corpus.name for corpus in whole.by_corpus] == ["prose", "exam", "unseen"]
    for corpus, quality in zip(whole.by_corpus, alone, strict=True):
        assert (corpus.kl, corpus.perplexity) == pytest.approx((quality.kl, quality.perplexity), rel=1e-4)
        assert quality.kl > 0
    numbers = {name: value for name, value in counted.scalars().items() if name != "state"}
    assert {name: getattr(whole, name) for name in numbers} == pytest.approx(numbers, rel=1e-4, nan_ok=True)
    assert whole.tokens_by_sequence == (*counted.tokens_by_sequence, 0)
    assert paired_kl(whole, whole).sequences == 3
    assert nameless.by_corpus == ()


def test_accuracy_probability_and_margin_follow_from_the_loglikelihoods(loaded: LoadedModel) -> None:
    packed = [packed_item(loaded.encode, *item) for item in ITEMS]
    values = [torch.tensor(row) for row in loglikelihoods(loaded.model, packed)]
    quality = Workload(packed, loaded.model).reference(loaded.model)
    answers = [answer for _, _, answer in ITEMS]
    right = [float(row.argmax() == answer) for row, answer in zip(values, answers, strict=True)]
    correct = [float(row.softmax(0)[answer]) for row, answer in zip(values, answers, strict=True)]
    assert quality.accuracy == pytest.approx(sum(right) / 3)
    assert quality.expected_accuracy == pytest.approx(sum(correct) / 3, abs=1e-4)
    margins = [
        float(row[answer] - torch.cat([row[:answer], row[answer + 1 :]]).max())
        for row, answer in zip(values, answers, strict=True)
    ]
    assert quality.margin == pytest.approx(sum(margins) / 3, abs=1e-3)
    assert quality.expected_accuracy_standard_error == pytest.approx(
        float(torch.tensor(correct).std()) / math.sqrt(3), abs=1e-4
    )


def test_batching_changes_no_figure(loaded: LoadedModel) -> None:
    def measured(batch_tokens: int) -> Quality:
        workload = Workload(sequences(loaded), loaded.model, batch_tokens)
        return workload.reference(loaded.model)

    one, many = measured(1), measured(10_000)
    for name, value in one.scalars().items():
        if isinstance(value, float):
            assert getattr(many, name) == pytest.approx(value, abs=1e-4, rel=1e-3)


def test_nonfinite_logits_are_a_state_and_never_an_accuracy(loaded: LoadedModel) -> None:
    fresh = load_model(loaded.model_id, "cpu")
    workload = Workload(sequences(fresh), fresh.model)
    workload.reference(fresh.model)
    next(module for name, module in fresh.model.named_modules() if name.endswith("mlp")).register_forward_hook(
        lambda module, args, output: output * torch.nan
    )
    quality = workload.measure(fresh.model)
    assert quality.state == "nonfinite"
    assert math.isnan(quality.kl)
    assert math.isnan(quality.accuracy)
    assert quality.items == 0


def test_a_dense_model_with_nonfinite_logits_is_refused() -> None:
    fresh = load_model("random:tiny-llama", "cpu")
    fresh.model.lm_head.register_forward_hook(lambda module, args, output: output * torch.inf)
    with pytest.raises(ValueError, match="infinite logits"):
        Workload([packed_text(fresh.encode(TEXTS[0]))], fresh.model).reference(fresh.model)


def test_tokens_that_merge_across_the_boundary_are_scored_as_lm_eval_cuts_them() -> None:
    """A tokenizer under which the first continuation swallows the end of the context."""

    def encode(text: str) -> list[int]:
        return [ord(character) for character in text.replace("ab", "\x01")]

    packed = packed_item(encode, "xxa", ("b", "c"), 0)
    # "xxab" is x, x, ab; the context alone is x, x, a: lm-eval scores what follows the third token, here its last one
    assert packed.tokens[: packed.prefix] == (ord("x"), ord("x"))
    assert [packed.tokens[start:stop] for start, stop, _ in packed.branches] == [(1,), (ord("a"), ord("c"))]
    assert [stop - first for _, stop, first in packed.branches] == [1, 1]


def test_trailing_spaces_of_the_context_move_to_the_continuation() -> None:
    def encode(text: str) -> list[int]:
        return list(map(ord, text))

    packed = packed_item(encode, "ab ", ("c", "d"), 1)
    assert packed.tokens[: packed.prefix] == (97, 98)
    assert packed.tokens[packed.branches[0][0] : packed.branches[0][1]] == (32, 99)


@pytest.mark.parametrize(
    ("context", "continuations", "answer"), [("", ("a",), 0), ("q", ("a", ""), 0), ("q", ("a",), 1), ("q", ("a",), -1)]
)
def test_items_that_cannot_be_scored_are_refused(context: str, continuations: tuple[str, ...], answer: int) -> None:
    with pytest.raises(ValueError, match=r"must not be empty|answer must"):
        packed_item(lambda text: list(map(ord, text)), context, continuations, answer)


def test_an_empty_workload_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match="at least one sequence"):
        Workload([packed_text([3])], loaded.model)


def test_mixed_batches_change_no_figure(loaded: LoadedModel) -> None:
    plain, mixed = (
        Workload(sequences(loaded), loaded.model, 300, mixed).reference(loaded.model) for mixed in (False, True)
    )
    for name, value in plain.scalars().items():
        if isinstance(value, float):
            assert getattr(mixed, name) == pytest.approx(value, abs=1e-4, rel=1e-3)


@pytest.mark.parametrize("batch_tokens", [100, 512, 1024])
def test_mixed_batches_keep_to_the_limit_and_hold_every_row_once(batch_tokens: int) -> None:
    lengths = [17 * number % 300 + 2 for number in range(60)]
    rows = pack(lengths)
    batches = list(group(mix(rows, lengths), lengths, batch_tokens, by_length=False))
    assert sorted(row for batch in batches for row in batch) == sorted(rows)
    for batch in batches:
        longest = max(sum(lengths[number] for number in row) for row in batch)
        assert len(batch) == 1 or len(batch) * longest <= batch_tokens


def test_batches_have_the_fewest_padded_tokens() -> None:
    rows, lengths = [[number] for number in range(7)], [30, 90, 31, 400, 95, 1200, 88]
    batches = group(rows, lengths, 500)

    def cost(division: list[list[int]]) -> int:
        return sum(48 + len(part) * max(part) for part in division)

    ordered = sorted(lengths)
    divisions = [
        [ordered[start:stop] for start, stop in itertools.pairwise([0, *cuts, 7])]
        for count in range(7)
        for cuts in itertools.combinations(range(1, 7), count)
    ]
    allowed = [d for d in divisions if all(len(part) == 1 or len(part) * max(part) <= 500 for part in d)]
    assert cost([[lengths[number] for [number] in batch] for batch in batches]) == min(map(cost, allowed))


def test_any_beginning_of_mixed_rows_is_like_the_whole() -> None:
    lengths = [*range(130, 190), *[256] * 30]
    rows = mix(pack(lengths, capacity=1), lengths)
    assert len(rows) == 90
    for stop in range(9, 91, 9):
        seen = [lengths[number] for [number] in rows[:stop]]
        assert abs(sum(length == 256 for length in seen) - stop / 3) <= 1.5
        assert abs(sum(seen) / stop - sum(lengths) / 90) < 6


def test_a_measurement_stops_when_it_is_called_hopeless(loaded: LoadedModel) -> None:
    workload = Workload(sequences(loaded), loaded.model, 100)
    whole = workload.reference(loaded.model)
    asked: list[tuple[int, int]] = []

    def should_stop(seen: Quality, checks: int) -> bool:
        asked.append((seen.tokens, checks))
        return True

    partial = workload.measure(loaded.model, should_stop=should_stop)
    assert partial.state == "raced"
    assert [partial.tokens] == [tokens for tokens, _ in asked]
    assert 0 < partial.tokens < whole.tokens
    assert sum(count > 0 for count in partial.tokens_by_sequence) < len(workload.sequences)
    asked.clear()
    assert workload.measure(loaded.model, should_stop=lambda *seen: asked.append(seen) or False).state == "ok"
    assert len(asked) == asked[0][1]


def direct_kl(before: Any, after: Any, tokens: list[int]) -> float:
    with torch.no_grad():
        one, two = (model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)[:-1] for model in (before, after))
    return float((one.exp() * (one - two)).sum(-1).mean())


@pytest.mark.parametrize(
    "case",
    ["linear head", "capped logits", "half precision", "half precision, made again", "other head", "other capped head"],
)
def test_kl_equals_a_direct_computation_whatever_the_head_does(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense probabilities are kept as mean output embeddings, or not at all, only where that is the same."""
    if case.endswith("made again"):
        monkeypatch.setattr(logits, "_SHORT_OF_MEMORY", ("cpu",))
        monkeypatch.setattr(logits, "rounds_products", lambda weight: False)  # as on a GPU
    loaded = load_model("random:tiny-llama", "cpu")
    model, tokens = loaded.model, loaded.encode(TEXTS[0])
    if "capped" in case:
        model.lm_head.register_forward_hook(lambda module, args, output: 3 * torch.tanh(output / 3))
    if case.startswith("half"):
        model.bfloat16()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(0.3)
        head = 1.2 * model.lm_head.weight if case.startswith("other") else model.lm_head.weight
    other.lm_head.weight = torch.nn.Parameter(head, requires_grad=False) if case.startswith("other") else head
    workload = Workload([packed_text(tokens)], loaded.model)
    assert workload.reference(model).kl == 0
    assert hasattr(workload._batches[0].dense, "_probability") == ("capped" in case)
    tolerance = 0.02 if case.startswith("half") else 1e-3
    assert workload.measure(other).kl == pytest.approx(direct_kl(model, other, tokens), rel=tolerance)


def test_a_head_that_was_written_to_after_the_reference_is_noticed() -> None:
    loaded = load_model("random:tiny-llama", "cpu")
    workload = Workload([packed_text(loaded.encode(TEXTS[0]))], loaded.model)
    workload.reference(loaded.model)
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(1.1)
    with pytest.raises(ValueError, match="take the reference again"):
        workload.measure(loaded.model)


def test_rows_of_16_bit_models_have_few_lengths_on_a_cpu_and_the_same_quality() -> None:
    loaded = load_model("random:tiny-llama", "cpu")
    sequences = [packed_text(loaded.encode(text)) for text in TEXTS]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(loaded.model).to(dtype)
        workload = Workload(sequences, model, batch_tokens=256)
        tokens = [batch.inputs["input_ids"].numel() for batch in workload._batches]
        assert max(tokens) <= max(256, *(len(sequence.tokens) for sequence in sequences))
        lengths = [batch.inputs["input_ids"].shape[1] for batch in workload._batches]
        found.append((lengths, workload.reference(model).perplexity))
    assert [-(-length // 32) * 32 for length in found[0][0] if length <= 256] == [n for n in found[1][0] if n <= 256]
    assert found[1][1] == pytest.approx(found[0][1], rel=0.02)

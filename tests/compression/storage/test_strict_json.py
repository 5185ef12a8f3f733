import json

import pytest

from compression.refusal import Refusal
from compression.storage import strict_json
from compression.storage.strict_json import LARGEST, bounded_text, parse, read_object, shown

MILLION = 1_000_000


@pytest.fixture
def unparsed(monkeypatch):
    """Fails a test that parses anything."""
    monkeypatch.setattr(strict_json, "_decoder", lambda keys: pytest.fail("it was parsed"))


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [' + "0," * MILLION + "0]}",
        '{"a": [' + "{}," * MILLION + "0]}",
        '{"a": [' + "[]," * MILLION + "0]}",
        '{"a": ' + "[" * MILLION,
        "{" + ",".join(f'"{number:x}":0' for number in range(300_000)) + "}",
    ],
    ids=["numbers", "objects", "lists", "deep", "keys"],
)
def test_a_file_of_too_many_values_is_refused_before_it_is_parsed(text, tmp_path, unparsed):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(Refusal, match=r"cannot use the file .*: it holds too many values"):
        read_object(tmp_path / "file.json", "the file")


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path, unparsed):
    with (tmp_path / "file.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(Refusal, match=f"larger than {LARGEST} bytes"):
        bounded_text(tmp_path / "file.json", "the file")


def test_commas_in_a_text_of_usual_length_do_no_harm(tmp_path):
    values = {"text": "one, two: [three]" * 1000}
    (tmp_path / "file.json").write_text(json.dumps(values))
    assert read_object(tmp_path / "file.json", "the file") == values


def test_the_number_of_keys_of_an_object_can_be_limited():
    text = json.dumps({"a": dict.fromkeys(map(str, range(11)), 0)})
    assert parse(text, keys=11) == json.loads(text)
    with pytest.raises(Refusal, match="an object has 11 keys, such as '0', and at most 10 are read"):
        parse(text, keys=10)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        ("a" * 99, "'" + "a" * 76 + "..."),
        ([0] * MILLION, "a list of 1000000 values"),
        (dict.fromkeys(range(99)), "an object of 99 values"),
        ([1, 2], "[1, 2]"),
    ],
)
def test_a_value_in_a_message_is_short(value, text):
    assert shown(value) == text

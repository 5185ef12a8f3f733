"""Token ids of long texts are made once, are those of the tokenizer, and are made again where a file is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from search.experiment import token_streams
from search.experiment.token_streams import token_stream
from search.model.loading import LoadedModel, load_model
from search.runtime.errors import DataUnavailable

TEXTS = ["A first text. ", "Question: why?\n\n", "Wörld <|endoftext|>"]


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    monkeypatch.setenv("CHISEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_streams, "_SHORT", 1)
    return load_model("random:tiny-llama", "cpu")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were tokenized."""
    texts: list[str] = []
    encode = LoadedModel.encode

    def noted(self: LoadedModel, text: str) -> list[int]:
        texts.append(text)
        return encode(self, text)

    monkeypatch.setattr(LoadedModel, "encode", noted)
    return texts


def directly(loaded: LoadedModel, texts: list[str]) -> list[int]:
    return [token for text in texts for token in loaded.tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_ids_are_those_of_the_tokenizer_and_are_made_once(loaded: LoadedModel, encoded: list[str]) -> None:
    wanted = directly(loaded, TEXTS)
    assert token_stream(loaded, TEXTS) == token_stream(loaded, TEXTS) == wanted
    assert encoded == TEXTS
    assert token_stream(loaded, TEXTS[1:]) == directly(loaded, TEXTS[1:])
    assert token_stream(loaded, ["".join(TEXTS)]) == directly(loaded, ["".join(TEXTS)])


def test_another_tokenizer_never_gets_them(loaded: LoadedModel, tmp_path: Path, encoded: list[str]) -> None:
    token_stream(loaded, TEXTS)
    for change in ("add a token", "split special tokens"):
        other = load_model("random:tiny-llama", "cpu")
        if change == "add a token":
            other.tokenizer.add_tokens(["first"])
        else:
            other.tokenizer.split_special_tokens = True
        assert other.tokenizer_digest != loaded.tokenizer_digest
    assert load_model("random:tiny-llama", "cpu").tokenizer_digest == loaded.tokenizer_digest


def test_a_tokenizer_with_code_of_its_own_is_asked_every_time(loaded: LoadedModel, encoded: list[str]) -> None:
    own: Any = type("Own", (type(loaded.tokenizer),), {"__module__": "tokenizer_of_a_model"})
    loaded.tokenizer.__class__ = own
    assert token_stream(loaded, TEXTS) == token_stream(loaded, TEXTS)
    assert encoded == 2 * TEXTS


def test_a_damaged_file_is_made_again_in_silence(
    loaded: LoadedModel, tmp_path: Path, encoded: list[str], recwarn: pytest.WarningsRecorder
) -> None:
    wanted = token_stream(loaded, TEXTS)
    [file] = (tmp_path / "cache" / "tokens").rglob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert token_stream(loaded, TEXTS) == wanted
    assert encoded == 2 * TEXTS
    assert token_stream(loaded, TEXTS) == wanted
    assert (len(encoded), len(recwarn)) == (2 * len(TEXTS), 0)


def test_a_cache_that_cannot_be_written_is_done_without(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def unwritable() -> Path:
        raise DataUnavailable("cannot write")

    monkeypatch.setattr(token_streams, "cache_folder", unwritable)
    assert token_stream(loaded, TEXTS) == directly(loaded, TEXTS)
    monkeypatch.setattr(token_streams, "cache_folder", lambda: Path("/dev/null"))
    assert token_stream(loaded, TEXTS) == directly(loaded, TEXTS)


def test_short_texts_are_not_stored(loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_streams, "_SHORT", 1000)
    assert token_stream(loaded, TEXTS) == directly(loaded, TEXTS)
    assert not (tmp_path / "cache" / "tokens").exists()

"""Reads a user's own text for calibration: plain text, records with a text, or chats in the model's own format.

Knows file formats and chat templates; does not know tokens or what the text is used for. Records have `text`, or one
of the layouts of `search.data.conversations`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from compression.refusal import Refusal
from search.data.conversations import FILES, MOST, SHORT, find_files, plain_turns, records, turns_of
from search.runtime.files import file_digest

__all__ = ["own_text_digest", "read_own_text"]

_LARGEST = 1 << 30
"""Bytes of the largest plain text file, which is read into memory at once."""
_PIECE = 2000
"""Characters of a paragraph above which it is divided, so that one overlap does not leave out a whole file."""


def own_text_digest(source: str) -> str:
    """The sha256 of the file of a source in hex.

    Raises:
        ValueError, DataUnavailable: as for `read_own_text`.
    """
    return file_digest(_file(source))


def read_own_text(source: str, tokenizer: Any = None, characters: int | None = None) -> tuple[str, ...]:
    """Read the documents of a source: the paragraphs of a text file, or one document for every record.

    Chats are written with the chat template of the model, without its beginning-of-sequence token, which every sequence
    gets later; without a template, as in Alpaca.

    Args:
        source: a text file, a .json, .jsonl or .parquet file, a hub id, or alpaca, ultrachat or openhermes.
        tokenizer: the tokenizer of the model; None formats no chat, to check the source before there is a model.
        characters: number of characters that are enough; of a longer source, every n-th document is returned.

    Raises:
        ValueError: the source does not exist, holds no text, or cannot be read; the message names the file, and the
            line or record.
        DataUnavailable: the hub cannot be reached.
    """
    file = _file(source)
    if file.suffix in FILES:
        found = [(where, _content(record, where)) for where, record in islice(records(file), MOST)]
    else:
        found = [(source, [("", piece)]) for piece in _pieces(_plain(file))]
    found = [(where, turns) for where, turns in found if any(text.strip() for _, text in turns)]
    if not found:
        raise Refusal(f"calibration {source!r} holds no text")
    total = sum(len(text) for _, turns in found for _, text in turns)
    step = 1 if characters is None else max(1, total // characters)
    return tuple(_written(turns, where, tokenizer) for where, turns in found[::step])


def _file(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.exists():
        raise Refusal(f"calibration must be a file or a hub id, and {source!r} is neither")
    if source.lower() not in SHORT and (source.count("/") != 1 or path.suffix in FILES):
        raise Refusal(f"calibration must be an existing file or a hub id, got {source!r}")
    return find_files(SHORT.get(source.lower(), source))[0]


def _plain(file: Path) -> str:
    """The content of a plain text file."""
    try:
        if file.stat().st_size > _LARGEST:
            raise Refusal(f"{file} is larger than {_LARGEST >> 20} MB; write it as .jsonl")
        content = file.read_bytes()
    except OSError as error:
        raise Refusal(f"calibration {str(file)!r} cannot be read: {error.strerror or error}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise Refusal(f"{file}, line {line}: must be UTF-8 text, but byte {error.start} is not") from None
    if (at := text.find("\0")) >= 0:
        line = 1 + text.count("\n", 0, at)
        raise Refusal(f"{file}, line {line}: must be text, but holds a zero byte")
    return text.replace("\r\n", "\n")


def _pieces(text: str) -> Iterator[str]:
    """Yield the paragraphs of a text; those that are longer than `_PIECE` characters in groups of lines."""
    for paragraph in re.split(r"\n[ \t]*\n", text):
        lines: list[str] = []
        for line in paragraph.strip().split("\n"):
            if lines and sum(map(len, lines)) + len(line) > _PIECE:
                yield "\n".join(lines)
                lines = []
            lines.append(line)
        yield "\n".join(lines)


def _content(record: object, where: str) -> list[tuple[str, str]]:
    """Return the turns (role, text) of a record; the role of a plain text is empty."""
    if isinstance(record, Mapping) and "text" in record:
        if not isinstance(record["text"], str):
            raise Refusal(f"{where}: text must be text, got {record['text']!r:.60}")
        turns = [("", record["text"])]
    else:
        turns = turns_of(record, where, "text, messages, or instruction and output")
    try:
        "".join(text for _, text in turns).encode()
    except UnicodeEncodeError:
        raise Refusal(f"{where}: must be text, but holds half of a surrogate pair") from None
    return turns


def _written(turns: list[tuple[str, str]], where: str, tokenizer: Any) -> str:
    if turns[0][0] == "":
        return turns[0][1]
    if not getattr(tokenizer, "chat_template", None):
        return "".join(text for text, _ in plain_turns(turns))
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        written = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program and can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refusal(f"{where}: the chat template of the model does not take these messages: {reason}") from None
    return written.removeprefix(tokenizer.bos_token or "")

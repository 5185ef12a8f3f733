"""Remembers the token ids of long texts between processes, which take seconds to make.

Knows tokenizers of transformers and the cache; does not know what the texts are for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from compression.storage.factor_cache import Bundle, FactorCache, cache_key
from search.model.loading import LoadedModel
from search.runtime.errors import DataUnavailable
from search.runtime.files import cache_folder

__all__ = ["token_stream"]

_SHORT = 1 << 16  # texts of fewer characters together are tokenized anew, in a few hundredths of a second


def token_stream(loaded: LoadedModel, texts: Sequence[str]) -> list[int]:
    """The token ids of texts, one after the other, as `LoadedModel.encode` gives them.

    The ids of long texts are stored in the cache under a digest of the texts and of the whole tokenizer. They are made
    anew if their file is damaged or cannot be written.

    Raises:
        Refusal: as for `LoadedModel.known`.
    """

    def encoded() -> list[int]:
        return [token for text in texts for token in loaded.encode(text)]

    if loaded.tokenizer_digest is None or sum(map(len, texts)) < _SHORT:
        return encoded()
    key = cache_key(
        kind="token ids",
        format=1,
        tokenizer=loaded.tokenizer_digest,
        texts=[hashlib.sha256(text.encode()).hexdigest() for text in texts],
    )
    try:
        cache = FactorCache(cache_folder() / "tokens", warn=lambda message: None)
        found = cache.get_or_build(key, lambda: Bundle({"ids": torch.tensor(encoded(), dtype=torch.int32)}))
    except (OSError, DataUnavailable):
        return encoded()
    return loaded.known(found.tensors["ids"].tolist())

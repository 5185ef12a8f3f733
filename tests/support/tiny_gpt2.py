"""A GPT-2 with few positions, few tokens or no first and last token."""

from __future__ import annotations

import transformers

from search.model.loading import LoadedModel
from search.model.random_models import byte_tokenizer


def tiny_gpt2(positions: int = 32, rows: int = 257, ends: bool = True) -> LoadedModel:
    """A random model and the tokenizer of bytes.

    Args:
        rows: number of tokens that the model has embeddings for; the tokenizer makes 257.
        ends: whether the tokenizer has a token for the beginning and the end of a text.
    """
    shape = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": positions, "vocab_size": rows}
    config = transformers.AutoConfig.for_model("gpt2", **shape, bos_token_id=None, eos_token_id=None)
    model, tokenizer = transformers.AutoModelForCausalLM.from_config(config).eval(), byte_tokenizer()
    if not ends:
        tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = None
    return LoadedModel(model, tokenizer, "tiny", "0" * 64, "none")

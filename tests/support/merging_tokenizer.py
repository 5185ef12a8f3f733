"""A byte-level tokenizer of 257 tokens with a merge, which llama.cpp asks for."""

from __future__ import annotations

import json

import transformers
from tokenizers import Tokenizer

from search.model.random_models import byte_tokenizer

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def merging_tokenizer(pre_tokenizer=None):
    """The tokenizer of the tiny models, with "th" in the place of a byte that no text has, and GPT-2's way to cut.

    Args:
        pre_tokenizer: another way to cut texts, as in tokenizer.json.
    """
    stated = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    vocabulary = stated["model"]["vocab"]
    vocabulary["th"] = vocabulary.pop("ÿ")
    stated["model"]["merges"] = [["t", "h"]]
    stated["pre_tokenizer"] = pre_tokenizer or {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    end = "<|endoftext|>"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(stated)),
        bos_token=end,
        eos_token=end,
        pad_token=end,
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )

"""Tiny random encoders as folders, with a tokenizer that puts [CLS] and [SEP] around a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers.processors import TemplateProcessing

from search.model.random_models import byte_tokenizer

_SHAPE = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 258,
    "cls_token_id": 259,
    "sep_token_id": 260,
    "bos_token_id": 259,
    "eos_token_id": 260,
}
SHAPES: dict[str, dict[str, Any]] = {
    "bert": {**_SHAPE, "type_vocab_size": 2},
    "roberta": {**_SHAPE, "type_vocab_size": 1, "max_position_embeddings": 771},  # counted from 258 + 1 on
    "modernbert": {**_SHAPE, "global_attn_every_n_layers": 2, "local_attention": 64},
}
"""Configurations by model type, with the field names of transformers."""
LABELS = ("bad", "good", "mixed")


def encoder_tokenizer() -> Any:
    """A token for every byte, and 257 to 260 for [MASK], [PAD], [CLS] and [SEP]."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        {"mask_token": "[MASK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    )
    tokens = [("[CLS]", tokenizer.cls_token_id), ("[SEP]", tokenizer.sep_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=["[CLS]", "$A", "[SEP]"], special_tokens=tokens
    )
    return tokenizer


def encoder_folder(folder: Path, kind: str, classifies: bool = False) -> Path:
    """Write an encoder of one of `SHAPES`, with the head for masked tokens or for `LABELS`, and return the folder."""
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: at for at, name in enumerate(LABELS)}}
    auto = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForMaskedLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(
            transformers.AutoConfig.for_model(kind, **SHAPES[kind], **(names if classifies else {}))
        )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.ndim > 1 and "embeddings" not in name:
                values.normal_(0, 0.2, generator=generator)
    model.save_pretrained(folder)
    encoder_tokenizer().save_pretrained(folder)
    return folder

"""A tokenizer as SentencePiece makes them: spaces written as "▁", merges, and bytes for what it does not know."""

from __future__ import annotations

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, processors

MADE = ("th", "▁th", "er", "▁the", "we", "▁we", "at", "ath", "ather")


def pieces_tokenizer(prefix: bool = True):
    """A tokenizer of Llama 2's kind with fewer than 320 tokens, which puts its beginning-of-text token before a text.

    Args:
        prefix: whether a space is put before a text.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *MADE, *letters])}
    pairs = [(piece[:at], piece[at:]) for piece in MADE for at in range(1, len(piece))]
    merges = [pair for pair in pairs if all(part in vocabulary for part in pair)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )

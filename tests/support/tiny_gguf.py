"""Writes a tiny random Llama as a GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf

from search.model.loading import load_model

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def written(path: Path, tensors_per_file: int = 0, without: str = "", architecture: str = "llama") -> None:
    """Write the tiny Llama as GGUF.

    Args:
        tensors_per_file: largest number of tensors in a file; 0 writes one file.
        without: name of a tensor to leave out.
        architecture: what the file says that it is.
    """
    loaded = load_model("random:tiny-llama", "cpu")
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_per_file)
    writer.add_name("tiny")
    writer.add_vocab_size(257)
    writer.add_context_length(2048)
    writer.add_embedding_length(32)
    writer.add_block_count(3)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(loaded.tokenizer.get_vocab(), key=loaded.tokenizer.get_vocab().get)
    tokens[255] = "ab"  # the format needs a merge
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_token_types([1] * 256 + [3])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)
    for name, values in loaded.model.state_dict().items():
        place, _, leaf = name.removeprefix("model.").removesuffix(".weight").partition("layers.")
        if leaf:
            block, _, inner = leaf.partition(".")
            if (found := f"blk.{block}.{NAMES[inner]}.weight") != without:
                writer.add_tensor(found, values.numpy())
        elif place != "lm_head":
            writer.add_tensor({"embed_tokens": "token_embd", "norm": "output_norm"}[place] + ".weight", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

"""Tiny random models of many architectures of transformers, to try whatever works "on any model" on all of them.

Every entry of `ZOO` is the model type of a configuration with its settings. The widths are small and uneven, so that a
matrix taken for another one has the wrong shape, and weights are large enough for predictions that differ by token.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from search.model.random_models import byte_tokenizer

__all__ = ["KINDS", "ZOO", "make_model", "write_model"]

_SCALE = 0.12  # standard deviation of matrices that an architecture initializes smaller
_TOKENS = dict(vocab_size=257, bos_token_id=256, eos_token_id=256, pad_token_id=256)
_PLAIN = dict(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=96,
    max_position_embeddings=2048,
    initializer_range=0.15,
    **_TOKENS,
)
_GROUPED = dict(**_PLAIN, num_key_value_heads=2)
_HEADS = dict(**_GROUPED, head_dim=16)
_GPT = dict(n_embd=64, n_layer=3, n_head=4, n_positions=2048, initializer_range=0.15, **_TOKENS)
_ROUTED = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
_LOCAL = dict(num_local_experts=4, num_experts_per_tok=2)
_SHARED_EXPERTS = dict(
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=48,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)
_DEEPSEEK = dict(
    **_PLAIN,
    num_key_value_heads=4,
    kv_lora_rank=32,
    q_lora_rank=48,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
    **_SHARED_EXPERTS,
)
_WINDOW = dict(sliding_window=64)
_MIXED = dict(**_WINDOW, layer_types=["sliding_attention", "sliding_attention", "full_attention"])
_GEMMA = dict(**_GROUPED, head_dim=24)
_GEMMA_3 = dict(**_GEMMA, **_MIXED, query_pre_attn_scalar=24)
_GEMMA_4 = dict(**_HEADS, **_MIXED, hidden_size_per_layer_input=16, vocab_size_per_layer_input=257)
_DELTA = _HEADS | dict(
    num_hidden_layers=4,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
)
_SCAN = dict(hidden_size=64, num_hidden_layers=3, initializer_range=0.15, **_TOKENS)
_SIGHT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)
_SIGHT_QWEN = dict(
    hidden_size=32, intermediate_size=48, depth=2, num_heads=2, out_hidden_size=64, num_position_embeddings=16
)

ZOO: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    # attention and an MLP, whatever their details
    "llama": ("llama", dict(**_GROUPED, tie_word_embeddings=False)),
    "llama-biased": ("llama", dict(**_GROUPED, head_dim=24, attention_bias=True, mlp_bias=True)),
    "qwen2": ("qwen2", dict(**_GROUPED, tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(**_GROUPED, head_dim=32, tie_word_embeddings=True)),
    "mistral": ("mistral", dict(**_GROUPED, sliding_window=None)),
    "gemma": ("gemma", _GEMMA),
    "phi": ("phi", _GROUPED),
    "phi3": ("phi3", dict(**_GROUPED, tie_word_embeddings=False)),
    "gpt2": ("gpt2", dict(**_GPT, n_inner=128)),
    "gpt_bigcode": ("gpt_bigcode", dict(**_GPT, n_inner=128, multi_query=True)),
    "gpt_neox": ("gpt_neox", _PLAIN),
    "gptj": ("gptj", dict(**_GPT, rotary_dim=8)),
    "opt": ("opt", dict(**_PLAIN, ffn_dim=96, word_embed_proj_dim=64, init_std=0.15)),
    "falcon": ("falcon", dict(**_PLAIN, multi_query=True, new_decoder_architecture=False, alibi=False)),
    "stablelm": ("stablelm", _GROUPED),
    "starcoder2": ("starcoder2", dict(**_GROUPED, sliding_window=None)),
    "olmo": ("olmo", _GROUPED),
    "olmo2": ("olmo2", _GROUPED),
    "smollm3": ("smollm3", _GROUPED),
    "glm": ("glm", _HEADS),
    "glm4": ("glm4", _HEADS),
    "nemotron": ("nemotron", _GROUPED),
    "ministral3": ("ministral3", _HEADS),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _HEADS),
    "ernie4_5": ("ernie4_5", _GROUPED),
    "seed_oss": ("seed_oss", _HEADS),
    "apertus": ("apertus", _GROUPED),
    "bitnet": ("bitnet", _GROUPED),
    # positions by a bias of the attention
    "bloom": ("bloom", dict(hidden_size=64, n_layer=3, n_head=4, initializer_range=0.15, **_TOKENS)),
    "falcon-alibi": ("falcon", dict(**_PLAIN, multi_query=False, alibi=True, bias=True)),
    "mpt": ("mpt", dict(d_model=64, n_layers=3, n_heads=4, max_seq_len=2048, expansion_ratio=2, **_TOKENS)),
    # layers that see a window
    "mistral-window": ("mistral", dict(**_GROUPED, **_WINDOW)),
    "gpt_neo": (
        "gpt_neo",
        dict(
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=64,
            intermediate_size=96,
            max_position_embeddings=2048,
            **_TOKENS,
        ),
    ),
    "gemma2": ("gemma2", dict(**_GEMMA, **_WINDOW, query_pre_attn_scalar=24)),
    "gemma3_text": ("gemma3_text", _GEMMA_3),
    "gemma3n_text": ("gemma3n_text", dict(**_GEMMA_4, num_kv_shared_layers=0, laurel_rank=8)),
    "gemma4_text": ("gemma4_text", _GEMMA_4),
    "gemma4-capped": ("gemma4_text", dict(**_GEMMA_4, final_logit_softcapping=30.0)),
    "olmo3": ("olmo3", dict(**_GROUPED, **_WINDOW)),
    "cohere2": ("cohere2", dict(**_GROUPED, **_WINDOW)),
    "exaone4": ("exaone4", dict(**_GROUPED, **_WINDOW)),
    # logits that are scaled
    "granite": ("granite", dict(**_GROUPED, logits_scaling=8.0)),
    "cohere": ("cohere", _GROUPED),
    # experts and other routers
    "mixtral": ("mixtral", dict(**_GROUPED, **_LOCAL)),
    "qwen2_moe": ("qwen2_moe", dict(**_GROUPED, **_ROUTED, shared_expert_intermediate_size=64)),
    "qwen3_moe": ("qwen3_moe", dict(**_GROUPED, **_ROUTED)),
    "olmoe": ("olmoe", dict(**_GROUPED, num_experts=4, num_experts_per_tok=2)),
    "granitemoe": ("granitemoe", dict(**_GROUPED, **_LOCAL)),
    "phimoe": ("phimoe", dict(**_GROUPED, **_LOCAL)),
    "minimax_m2": ("minimax_m2", dict(**_HEADS, **_LOCAL)),
    "gpt_oss": ("gpt_oss", dict(**_HEADS, **_LOCAL, **_WINDOW)),
    "glm4_moe": (
        "glm4_moe",
        dict(**_HEADS, **_SHARED_EXPERTS),
    ),
    "llama4_text": (
        "llama4_text",
        dict(
            **_HEADS,
            num_local_experts=4,
            num_experts_per_tok=1,
            intermediate_size_mlp=96,
            interleave_moe_layer_step=2,
            attention_chunk_size=512,
        ),
    ),
    # latent attention
    "deepseek_v2": ("deepseek_v2", _DEEPSEEK),
    "deepseek_v3": ("deepseek_v3", _DEEPSEEK),
    # convolutions and recurrent states
    "lfm2": ("lfm2", dict(**_GROUPED, layer_types=["conv", "conv", "full_attention"], block_auto_adjust_ff_dim=False)),
    "qwen3_next": ("qwen3_next", dict(**_DELTA, **_ROUTED, shared_expert_intermediate_size=48)),
    "qwen3_5_text": ("qwen3_5_text", _DELTA),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", dict(**_DELTA, **_ROUTED, shared_expert_intermediate_size=48)),
    "mamba": ("mamba", dict(**_SCAN, state_size=8)),
    "falcon_mamba": ("falcon_mamba", dict(**_SCAN, state_size=8)),
    "mamba2": ("mamba2", dict(**_SCAN, state_size=16, num_heads=8, head_dim=16, n_groups=1, chunk_size=16)),
    "jamba": (
        "jamba",
        dict(
            **_GROUPED,
            num_experts=2,
            num_experts_per_tok=1,
            attn_layer_period=3,
            attn_layer_offset=2,
            use_mamba_kernels=False,
            mamba_d_state=8,
            mamba_dt_rank=8,
        ),
    ),
    "nemotron_h": (
        "nemotron_h",
        dict(
            **_HEADS,
            layers_block_type=["mamba", "attention", "mlp"],
            mamba_num_heads=8,
            mamba_head_dim=16,
            ssm_state_size=16,
            n_groups=1,
            chunk_size=16,
        ),
    ),
    "falcon_h1": (
        "falcon_h1",
        dict(
            **_GROUPED,
            mamba_d_ssm=128,
            mamba_n_heads=8,
            mamba_d_head=16,
            mamba_d_state=16,
            mamba_n_groups=1,
            mamba_chunk_size=16,
        ),
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        dict(
            **_GROUPED,
            **_LOCAL,
            shared_intermediate_size=64,
            layer_types=["mamba", "mamba", "attention"],
            mamba_n_heads=8,
            mamba_d_head=16,
            mamba_d_state=16,
            mamba_n_groups=1,
            mamba_chunk_size=16,
        ),
    ),
    # images and text
    "gemma3": ("gemma3", dict(text_config=_GEMMA_3, vision_config=_SIGHT, mm_tokens_per_image=4)),
    "gemma4": ("gemma4", dict(text_config=_GEMMA_4)),
    "mistral3": (
        "mistral3",
        dict(
            text_config=dict(**_GROUPED, model_type="mistral"),
            vision_config=dict(**_SIGHT, model_type="pixtral", head_dim=16),
        ),
    ),
    "qwen3_vl": (
        "qwen3_vl",
        dict(
            text_config=dict(
                **_HEADS, rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 2, 2])
            ),
            vision_config=dict(**_SIGHT_QWEN, deepstack_visual_indexes=[0]),
        ),
    ),
    # no causal language models
    "bert": ("bert", dict(**_PLAIN, type_vocab_size=2)),
    "roberta": ("roberta", dict(**_PLAIN, type_vocab_size=1)),
    "modernbert": (
        "modernbert",
        dict(**_PLAIN, global_attn_every_n_layers=2, local_attention=64, cls_token_id=256, sep_token_id=256),
    ),
    "t5": (
        "t5",
        dict(
            vocab_size=257,
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            pad_token_id=256,
            eos_token_id=256,
            decoder_start_token_id=256,
        ),
    ),
}
"""Model type and settings by name, in groups of what is unlike a plain decoder."""

KINDS = (
    *("gpt_neox", "gptj", "opt", "bloom", "gpt_neo", "gemma4-capped", "granite", "qwen3_moe", "llama4_text"),
    *("deepseek_v3", "qwen3_5_text", "jamba", "mamba2", "falcon_h1", "gemma3", "bert", "t5"),
)
"""One model for each way of being unlike a plain decoder."""

_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM")
_ENCODERS = ("bert", "roberta", "modernbert")


def make_model(name: str) -> Any:
    """A tiny random model of the zoo in evaluation mode, the same on every call."""
    kind, settings = ZOO[name]
    config = transformers.AutoConfig.for_model(kind, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _class_of(kind, config).from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1 and float(parameter.detach().std()) < _SCALE / 2:
                torch.nn.init.normal_(parameter, std=_SCALE)
    return model.eval().requires_grad_(False)


def _class_of(kind: str, config: Any) -> Any:
    """The first automatic class that has a model for this configuration; encoders are no causal language models."""
    for name in _CLASSES[2:] if kind in _ENCODERS else _CLASSES:
        automatic = getattr(transformers, name)
        if type(config) in automatic._model_mapping:
            return automatic
    raise ValueError(f"transformers has no language model of type {kind}")


def write_model(name: str, folder: Path) -> Path:
    """Write a model of the zoo with a tokenizer of single bytes to `folder`; returns the folder."""
    make_model(name).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    if ZOO[name][0] in _ENCODERS:
        tokenizer.mask_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return folder

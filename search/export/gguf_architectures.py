"""Names of the architectures that llama.cpp's convert_hf_to_gguf.py converts.

The converter looks up the class name in `architectures` of config.json. GGUF's own names do not decide: Mistral, for
example, is converted as "llama".
"""

from __future__ import annotations

__all__ = ["CONVERTIBLE", "SOURCE"]

SOURCE = "llama.cpp commit 00bdaa105cb0"
"""Where the names come from: TEXT_MODEL_MAP in conversion/__init__.py, causal language models only."""

CONVERTIBLE = frozenset(
    """
    AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM ArcticForCausalLM BaiChuanForCausalLM BaichuanForCausalLM
    BailingMoeForCausalLM BailingMoeV2ForCausalLM BambaForCausalLM BitnetForCausalLM BloomForCausalLM
    ChameleonForCausalLM CodeShellForCausalLM Cohere2ForCausalLM Cohere2MoeForCausalLM CohereForCausalLM
    DbrxForCausalLM DeciLMForCausalLM DeepseekForCausalLM DeepseekV2ForCausalLM DeepseekV32ForCausalLM
    DeepseekV3ForCausalLM Dots1ForCausalLM Ernie4_5ForCausalLM Ernie4_5_ForCausalLM Ernie4_5_MoeForCausalLM
    Exaone4ForCausalLM ExaoneForCausalLM ExaoneMoEForCausalLM FalconForCausalLM FalconH1ForCausalLM
    FalconMambaForCausalLM GPT2LMHeadModel GPTBigCodeForCausalLM GPTNeoXForCausalLM GPTRefactForCausalLM
    Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration Gemma3nForCausalLM
    Gemma3nForConditionalGeneration Gemma4ForCausalLM Gemma4ForConditionalGeneration GemmaForCausalLM
    Glm4ForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM GlmForCausalLM GptOssForCausalLM GraniteForCausalLM
    GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSharedForCausalLM Grok1ForCausalLM GrokForCausalLM
    GroveMoeForCausalLM HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM IQuestCoderForCausalLM
    InternLM2ForCausalLM InternLM3ForCausalLM JAISLMHeadModel Jais2ForCausalLM JambaForCausalLM KORMoForCausalLM
    KimiLinearForCausalLM LFM2ForCausalLM LLaMAForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM Llama4ForCausalLM
    Llama4ForConditionalGeneration LlamaForCausalLM MPTForCausalLM MaincoderForCausalLM Mamba2ForCausalLM
    MambaForCausalLM MellumForCausalLM MiMoV2FlashForCausalLM MiMoV2ForCausalLM MiniCPM3ForCausalLM
    MiniCPMForCausalLM MiniMaxM2ForCausalLM Ministral3ForCausalLM Mistral3ForConditionalGeneration
    MistralForCausalLM MixtralForCausalLM NemotronForCausalLM NemotronHForCausalLM OLMoForCausalLM Olmo2ForCausalLM
    Olmo3ForCausalLM OlmoForCausalLM OlmoeForCausalLM OpenELMForCausalLM OrionForCausalLM PLMForCausalLM
    PanguEmbeddedForCausalLM Phi3ForCausalLM PhiForCausalLM PhiMoEForCausalLM Plamo2ForCausalLM Plamo3ForCausalLM
    PlamoForCausalLM QWenLMHeadModel Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM
    Qwen3NextForCausalLM Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM RWForCausalLM RWKV6Qwen2ForCausalLM
    RWKV7ForCausalLM RuGPT3XLForCausalLM Rwkv6ForCausalLM Rwkv7ForCausalLM RwkvHybridForCausalLM
    SarvamMoEForCausalLM SeedOssForCausalLM SmallThinkerForCausalLM SmolLM3ForCausalLM SolarOpenForCausalLM
    StableLMEpochForCausalLM StableLmForCausalLM Starcoder2ForCausalLM Step3p5ForCausalLM TalkieForCausalLM
    XverseForCausalLM YoutuForCausalLM
    """.split()  # noqa: SIM905
)

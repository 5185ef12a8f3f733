"""The model class by which vLLM runs a compressed folder: its Transformers backend, with our modules put in.

vLLM's own layers take the place of the dense linear layers, norms and attention, so that requests are batched, prompts
are read in chunks, and keys and values are cached for the heads that are left.
"""

from __future__ import annotations

from dataclasses import replace

from vllm.config.model_arch import ModelArchitectureConfig
from vllm.model_executor.models.transformers import TransformersForCausalLM

from compression.refusal import Refusal
from search.serving.backbone import description_of, heads_by_layer, serve_backbone_

__all__ = ["ChiselForCausalLM"]


class ChiselForCausalLM(TransformersForCausalLM):  # type: ignore[misc]
    """A causal language model with compressed layers.

    Raises:
        ValueError: the folder was changed, or has what cannot be served; or several GPUs are to share each layer.
    """

    def _create_hf_to_vllm_mapper(self) -> None:
        if self.tp_group.world_size > 1:
            raise Refusal("factored layers are not split over GPUs; use --pipeline-parallel-size, or one GPU")
        if getattr(self.config, "quantization_config", None) is not None:  # code beside the weights puts them in itself
            serve_backbone_(self.model, self.config)
        super()._create_hf_to_vllm_mapper()

    def _create_attention_instances(self, prefix: str = "") -> None:
        heads = heads_by_layer(self.config, description_of(self.config))
        whole = self.model_config.model_arch_config
        if heads and whole.per_layer_overrides is None:
            layers = [heads.get(layer, {}) for layer in range(self.config.num_hidden_layers)]
            self.model_config.model_arch_config = ModelArchitectureConfig.from_layers(
                [
                    replace(whole, **{f"total_{name.replace('key_value', 'kv')}": n for name, n in each.items()})
                    for each in layers
                ]
            )
        super()._create_attention_instances(prefix)

"""Makes vLLM serve compressed folders: the entry point `vllm.general_plugins` of this package calls `register`.

vLLM calls it in each of its processes. The model itself is imported when a compressed folder is served, by the process
that runs it.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import ModelRegistry
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from compression.refusal import Refusal
from search.hf import METHOD, ChiselConfig
from search.serving.backbone import ARCHITECTURE

__all__ = ["Description", "register"]


class Description(QuantizationConfig):  # type: ignore[misc]
    """The `quantization_config` of a compressed folder; nothing is quantized by it.

    Raises:
        ValueError: the folder has a newer format.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        ChiselConfig(**{name: value for name, value in values.items() if name != "quant_method"})

    def get_name(self) -> str:
        """The method's name in config.json."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The data types in which such a model runs."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """No GPU is too old."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """The description is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Description:
        """The description in a config.json."""
        return cls(config)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> UnquantizedLinearMethod | None:
        """The method of a layer that is left dense.

        Raises:
            Refusal: vLLM builds the model by a class of its own, which knows no compressed layers.
        """
        from vllm.config import get_current_vllm_config

        if (named := get_current_vllm_config().model_config.architectures) != [ARCHITECTURE]:
            raise Refusal(
                f"architectures in config.json must be {ARCHITECTURE} for vLLM, and is {', '.join(named)}, as where "
                f"the folder was saved again by transformers; pass --hf-overrides "
                f'\'{{"architectures": ["{ARCHITECTURE}"]}}\', or export the run again'
            )
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def register() -> None:
    """Register the method and the architecture of compressed folders in this process."""
    register_quantization_config(METHOD)(Description)
    ModelRegistry.register_model(ARCHITECTURE, f"search.serving.vllm_model:{ARCHITECTURE}")

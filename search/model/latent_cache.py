"""Store latents instead of keys and values in a KV cache: χ numbers per token and layer if k or v has low rank.

A pivoted low-rank layer copies χ of its outputs from the latent, and all others follow from those
(`compression.layers.mpo_linear.MPOLinear.latent`). The cache therefore stores only these χ outputs, for k before the
rotary embedding. Each pass recomputes the keys and values of all positions from them, one block at a time. This trades
arithmetic for memory, as multi-head latent attention does (DeepSeek-V2, 2024), but without absorbing the factors into
other weights. The outputs of layers of any other form are stored in full. Knows transformers' caches and attention
modules with `k_proj`, `v_proj` and rotary positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from compression.layers.mpo_linear import MPOLinear
from compression.refusal import Refusal

__all__ = ["LatentCache", "cache_bytes", "latent_cache", "plain_cache"]

_PROBE = 6  # tokens in each of the two passes that test whether a model works with the cache
_TOLERANCE = 0.02  # largest error relative to the largest logit; allows for bfloat16 arithmetic


class LatentCache(Cache):  # type: ignore[misc]
    """A KV cache of latents with one layer per block; create it with `latent_cache`.

    Attributes:
        active: whether the current forward pass uses this cache.
    """

    def __init__(self, model: Any) -> None:
        base = model.base_model
        attentions = {
            module.layer_idx: module
            for module in base.modules()
            if hasattr(module, "layer_idx") and hasattr(module, "k_proj") and hasattr(module, "v_proj")
        }
        rotary = getattr(base, "rotary_emb", None)
        if sorted(attentions) != list(range(len(attentions))) or not attentions or rotary is None:
            raise Refusal("a latent cache needs attention with k_proj, v_proj and rotary positions in every block")
        self._rotary = rotary
        self._positions: torch.Tensor | None = None
        self._rotation: tuple[torch.Tensor, torch.Tensor] | None = None
        self.active = False
        layers = [_Layer(attentions[number], self) for number in range(len(attentions))]
        super().__init__(layers=layers)
        self._hooks = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            rotary.register_forward_hook(self._rotate, with_kwargs=True),
            *(layer.k.register_forward_hook(layer.catch) for layer in layers),
        ]

    @property
    def rotation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of all positions so far, each (batch or 1, positions, head size)."""
        assert self._rotation is not None
        return self._rotation

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """As in the base class; also reorders the stored positions."""
        super().reorder_cache(beam_idx)
        if self._positions is not None and len(self._positions) > 1:
            self._positions = self._positions.index_select(0, beam_idx)

    def crop(self, *arguments: Any) -> None:
        """As in the base class; also crops the stored positions."""
        super().crop(*arguments)
        if self._positions is not None:
            self._positions = self._positions[:, : self.get_seq_length()]

    def close(self) -> None:
        """Remove all hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.active = keywords.get("past_key_values") is self

    def _rotate(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: object) -> None:
        if self.active:
            hidden, *rest = arguments
            parts = [keywords["position_ids"] if "position_ids" in keywords else rest[0]]
            if self._positions is not None:
                parts.insert(0, self._positions)
            rows = max(map(len, parts))  # a single row of positions applies to the whole batch
            self._positions = torch.cat([part.expand(rows, -1) for part in parts], dim=1)
            self._rotation = module.forward(hidden, self._positions)


class _Layer(DynamicLayer):  # type: ignore[misc]
    """Latents (or full outputs) of k, before the rotary embedding, and of v in one block.

    Each is stored as (batch, 1, positions, χ or all outputs).
    """

    def __init__(self, attention: Any, cache: LatentCache) -> None:
        super().__init__()
        self.attention, self.cache = attention, cache
        self.k, self.v = attention.k_proj, attention.v_proj
        self._caught: torch.Tensor | None = None

    def catch(self, module: nn.Module, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
        """Forward hook that stores the output of `k_proj`."""
        if self.cache.active:
            self._caught = output

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (batch, heads, positions, head size) of all positions so far."""
        assert self._caught is not None
        new = _kept(self.k, self._caught), _kept(self.v, value_states.transpose(1, 2).flatten(2))
        self._caught = None
        kept = super().update(new[0].unsqueeze(1), new[1].unsqueeze(1))
        batch, _, positions, _ = kept[0].shape
        shape = (batch, positions, key_states.shape[1], key_states.shape[3])
        keys = _whole(self.k, kept[0].squeeze(1)).view(shape)
        norm = getattr(self.attention, "k_norm", None)
        keys = (keys if norm is None else norm(keys)).transpose(1, 2)
        cosines, sines = (each.unsqueeze(1) for each in self.cache.rotation)
        first, second = keys.chunk(2, dim=-1)
        rotated = keys * cosines + torch.cat((-second, first), dim=-1) * sines
        return rotated, _whole(self.v, kept[1].squeeze(1)).view(shape).transpose(1, 2)


@contextmanager
def latent_cache(model: Any) -> Iterator[LatentCache]:
    """Context with a new latent cache for `model`, to be passed as `past_key_values`.

    Raises:
        ValueError: the cache does not support the attention of the model: its modules are not of the expected form, or
            logits differ from those with a plain cache.
    """
    with _opened(model) as probe:
        _check(model, probe)
    with _opened(model) as cache:
        yield cache


def plain_cache(model: Any) -> Cache:
    """The default KV cache of a model."""
    return DynamicCache(config=model.config)


def cache_bytes(cache: Any) -> int:
    """Bytes of the stored keys and values or latents."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def _opened(model: Any) -> Iterator[LatentCache]:
    cache = LatentCache(model)
    try:
        yield cache
    finally:
        cache.close()


@torch.no_grad()
def _check(model: Any, cache: LatentCache) -> None:
    ids = torch.arange(1, 2 * _PROBE + 1, device=model.device)[None] % model.config.get_text_config().vocab_size
    found = []
    for each in (cache, plain_cache(model)):
        model(input_ids=ids[:, :_PROBE], past_key_values=each, use_cache=True)
        found.append(model(input_ids=ids[:, _PROBE:], past_key_values=each, use_cache=True).logits.float())
    if not float((found[0] - found[1]).abs().max()) <= _TOLERANCE * float(found[1].abs().max()):
        raise Refusal("a latent cache does not work with the attention of this model: its logits differ")


def _kept(projection: nn.Module, outputs: torch.Tensor) -> torch.Tensor:
    return projection.latent(outputs) if isinstance(projection, MPOLinear) and projection.has_latent else outputs


def _whole(projection: nn.Module, kept: torch.Tensor) -> torch.Tensor:
    return projection.outputs(kept) if isinstance(projection, MPOLinear) and projection.has_latent else kept

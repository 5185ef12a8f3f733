"""Says what each engine that may run a result can hold. Knows names and numbers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from compression.numerics.packed_size import BITS, FLOATING, GROUP, SCALE

__all__ = ["ENGINES", "INTEGERS", "Engine"]


@dataclass(frozen=True)
class Engine:
    """Describes what an engine can hold.

    Attributes:
        plain: format of an export, see `search.export.forms.FORMATS`, whose matrices are not rounded.
        rounded: format of one whose matrices may be rounded.
        bits: bits a number of its matrices, descending; `FLOATING` stands for those that are not rounded.
        group: neighbours of a rounded matrix that share a scale.
        scale_bytes: bytes that its files hold for such a group: the scale, and in MLX what code 0 stands for.
        ends: bits a number of the embedding and the output head, descending, and the bits of an average number of the
            result, scales counted, from which on they have so many. On SmolLM2-135M an embedding of 8, 6, 5 and 4 bits
            costs 0.002, 0.006, 0.018 and 0.064 nats per token, and matrices of 6, 4 and 3 bits 0.009, 0.096 and 0.369:
            per byte, one to two bits more for the embedding cost the same.
        factors: whether it computes with factored and pruned matrices.
        fused: whether it computes matrices that read the same as one, so that they need the same bits.
        whole_heads: whether an attention must keep all of its heads or none.
    """

    plain: str
    rounded: str
    bits: tuple[int, ...] = (FLOATING, *BITS)
    group: int = GROUP
    scale_bytes: int = SCALE
    ends: Mapping[int, float] = field(
        default_factory=lambda: MappingProxyType({8: 6.65, 6: 4.65, 5: 3.65, 4: 2.65, 3: 0.0})
    )
    factors: bool = False
    fused: bool = False
    whole_heads: bool = False

    def end_bits(self, average: float) -> int:
        """Returns the bits of the embedding and the output head where a number has so many on average."""
        return next(bits for bits, least in self.ends.items() if average >= least)


INTEGERS = ("compressed-tensors", "mlx")
"""Formats of folders in which matrices are rounded, as engines read them."""

ENGINES: Mapping[str, Engine] = MappingProxyType(
    {
        "transformers": Engine("hf", "hf", factors=True),
        "vllm": Engine(
            "plain",
            "compressed-tensors",
            bits=(FLOATING, 8, 4),  # what its kernels for GPUs (Marlin) take; those for processors take 4
            ends=MappingProxyType({FLOATING: 0.0}),  # it looks up rounded rows, but computes no logits with them
            fused=True,
            whole_heads=True,
        ),
        "llama.cpp": Engine(
            "gguf",
            "gguf",
            bits=(FLOATING, 8, 5, 4),  # F16, Q8_0, Q5_0 and Q4_0
            group=32,
            ends=MappingProxyType({8: 5.7, 5: 4.8, 4: 0.0}),
        ),
        "mlx-lm": Engine("plain", "mlx", scale_bytes=2 * SCALE),
    }
)
"""By the name that `--serve` takes."""

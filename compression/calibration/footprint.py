"""Computes from the shape of a decoder how much memory and disk space `compression.calibration.streaming` needs."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BlockShape", "Footprint", "footprint"]


@dataclass(frozen=True)
class BlockShape:
    """Holds the shape of a decoder with gated MLP, which determines the memory needed to stream it.

    Attributes:
        hidden: width of the hidden states.
        mlp: width of the gate and up outputs.
        key_value: number of output features of k, equal to that of v.
        blocks: number of blocks.
        vocabulary: number of tokens in the vocabulary.
        tied: whether the head shares its matrix with the embedding.
        bytes_per_weight: 4 for float32, 2 for bfloat16.
    """

    hidden: int
    mlp: int
    key_value: int
    blocks: int
    vocabulary: int
    tied: bool
    bytes_per_weight: int

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of q, k, v, o, gate, up, down."""
        hidden, key_value, mlp = self.hidden, self.key_value, self.mlp
        attention = ((hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden))
        return (*attention, (mlp, hidden), (mlp, hidden), (hidden, mlp))

    @property
    def block_bytes(self) -> int:
        """Bytes of the weights of one block, without norms."""
        return self.bytes_per_weight * sum(out * into for out, into in self.shapes)

    @property
    def table_bytes(self) -> int:
        """Bytes of the weights of the embedding."""
        return self.bytes_per_weight * self.vocabulary * self.hidden

    @property
    def model_bytes(self) -> int:
        """Bytes of the weights of the whole model, without norms and biases."""
        return self.blocks * self.block_bytes + (1 if self.tied else 2) * self.table_bytes


@dataclass(frozen=True)
class Footprint:
    """Holds the bytes needed by the phases of `stream`, with a two-sided `lowrank` decomposition of every site.

    Attributes:
        ends: the embedding or head with one row of logits, its softmax, cumulative sum and gradients in float32.
        collecting: a block, its moments, and the activations of one batch with their gradients.
        decomposing: a block, its moments, and the float64 workspace of its largest site.
        scratch: the hidden states on disk.
    """

    ends: int
    collecting: int
    decomposing: int
    scratch: int

    @property
    def peak(self) -> int:
        """Largest memory of any phase in bytes, in addition to the memory of the libraries."""
        return max(self.ends, self.collecting, self.decomposing)


def footprint(shape: BlockShape, tokens: int, batch_tokens: int, row_tokens: int) -> Footprint:
    """Computes from the shape of a model the memory and disk space that streaming it needs.

    Args:
        shape: the shape of the model.
        tokens: number of tokens of the calibration text.
        batch_tokens: number of tokens of one batch.
        row_tokens: number of tokens of one row of a batch.
    """
    moments = 4 * sum(out**2 + into**2 for out, into in shape.shapes)
    row = row_tokens * shape.vocabulary
    # Numbers per token that the backward pass keeps, and their gradients.
    widths = 12 * shape.hidden + 6 * shape.mlp + 4 * shape.key_value
    return Footprint(
        ends=shape.table_bytes + row * (4 * 4 + 2 * shape.bytes_per_weight),
        collecting=shape.block_bytes + moments + batch_tokens * widths * shape.bytes_per_weight,
        decomposing=shape.block_bytes + moments + max(_workspace(out, into) for out, into in shape.shapes),
        scratch=(shape.blocks + 3) * tokens * shape.hidden * shape.bytes_per_weight,
    )


def _workspace(out: int, into: int) -> int:
    """Returns the bytes that decomposing one site in the two-sided metric needs.

    These are two Cholesky factors, plus the larger of a third square matrix while factorizing and three float64 copies
    of the weight while whitening.
    """
    return 8 * (out**2 + into**2) + max(8 * max(out, into) ** 2, 3 * 8 * out * into)

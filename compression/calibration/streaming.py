"""Streaming: statistics of a model too large for memory, one block at a time, and what to do with them at each block.

Forward block by block over all calibration batches, with the hidden states at the borders of blocks kept on disk; then
the head and the gradient of sampled tokens; then backward block by block, each run again with gradients from the input
it had. Every block is loaded twice and never beside another one. The second moments are those of
`compression.calibration.statistics.collect` with tokens that count alike, by the same code.

Knows torch modules and token batches; where a block's weights come from and how it is called is the business of the
`BlockwiseModel` it is given.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import nn

from compression.calibration.statistics import MomentAccumulator, Statistics, sampled_gradient
from compression.sites import Site
from compression.storage.tensor_files import new_tensor_file

__all__ = ["Batch", "BlockShape", "BlockwiseModel", "Footprint", "footprint", "stream"]

Batch = tuple[torch.Tensor, torch.Tensor]


class BlockwiseModel(Protocol):
    """A causal language model that loads its parts when asked for them. Parameters require no gradients.

    Attributes:
        prefix: qualified name of the list of blocks; block i of the whole model is `prefix.i`.
        sites: the sites of the whole model.
        blocks: how many blocks there are.
    """

    prefix: str
    sites: tuple[Site, ...]
    blocks: int

    def embedding(self) -> AbstractContextManager[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """(input_ids, mask) → the input of block 0 (batch, length, width); the weights go when the context ends."""

    def block(self, index: int) -> nn.Module:
        """Block `index` with its weights, in evaluation mode; the caller holds the only reference."""

    def run(self, index: int, block: nn.Module, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The output of a block for its input, differentiable."""

    def head(self) -> AbstractContextManager[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """(output of the last block, mask) → logits, differentiable; the weights go when the context ends."""


def stream(
    model: BlockwiseModel,
    batches: Sequence[Batch],
    generator: torch.Generator,
    visit: Callable[[nn.Module, tuple[Site, ...], Statistics], None],
    scratch: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Give the statistics of every block to `visit`, last block first.

    Args:
        batches: as for `compression.calibration.statistics.collect`; the order of rows, not how they are batched,
            decides which tokens are sampled, as long as batches of equal length are split.
        generator: draws the sampled tokens; on the model's device.
        visit: called with a block, its sites and their statistics; what it keeps stays in memory.
        scratch: where the hidden states lie meanwhile, 1 + blocks times the size of the last hidden layer over all
            tokens; None is the system's folder for temporary files. Everything is removed at the end.
        progress: called with the number of block passes done, of 2·blocks.

    Raises:
        ValueError: no token at all, or a statistic is not finite.
        OSError: the scratch folder cannot be written, or is full.
    """
    with tempfile.TemporaryDirectory(dir=scratch, prefix="chisel-borders-") as folder:
        borders = _Borders(Path(folder))
        _forward(model, batches, borders, progress)
        _turn(model, batches, borders, generator)
        for index in reversed(range(model.blocks)):
            block = model.block(index)
            sites = tuple(site for site in model.sites if site.block == index)
            statistics = _backward(model, index, block, sites, batches, borders)
            visit(block, sites, statistics)
            del block, statistics
            progress(2 * model.blocks - index)


@torch.no_grad()
def _forward(
    model: BlockwiseModel, batches: Sequence[Batch], borders: _Borders, progress: Callable[[int], None]
) -> None:
    """Hidden states at every border: 0 before the first block, `model.blocks` after the last."""
    with model.embedding() as embed:
        for number, (input_ids, mask) in enumerate(batches):
            borders.put(0, number, embed(input_ids, mask))
    for index in range(model.blocks):
        block = model.block(index)
        for number, (_, mask) in enumerate(batches):
            borders.put(index + 1, number, model.run(index, block, borders.get(index, number, mask.device), mask))
        del block
        progress(index + 1)


def _turn(model: BlockwiseModel, batches: Sequence[Batch], borders: _Borders, generator: torch.Generator) -> None:
    """The last hidden states replaced by the gradients that reach them; one row of logits in memory at a time."""
    last = model.blocks
    with model.head() as head:
        for number, (_, mask) in enumerate(batches):
            gradients = []
            states = borders.get(last, number, mask.device)
            for hidden, row in zip(torch.split(states, 1), torch.split(mask, 1), strict=True):
                leaf = hidden.detach().requires_grad_()
                logits = head(leaf, row)
                logits.backward(sampled_gradient(logits.detach(), row, generator))  # type: ignore[no-untyped-call]
                assert leaf.grad is not None
                gradients.append(leaf.grad)
            borders.put(last, number, torch.cat(gradients))


def _backward(
    model: BlockwiseModel,
    index: int,
    block: nn.Module,
    sites: tuple[Site, ...],
    batches: Sequence[Batch],
    borders: _Borders,
) -> Statistics:
    """Statistics of one block; its inputs on disk are replaced by the gradients that reach them."""
    accumulator = MomentAccumulator(_Named(block, f"{model.prefix}.{index}."), sites)
    with accumulator:
        for number, (_, mask) in enumerate(batches):
            accumulator.expect(mask)
            leaf = borders.get(index, number, mask.device).requires_grad_()
            output = model.run(index, block, leaf, mask)
            output.backward(borders.get(index + 1, number, mask.device))  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            borders.put(index, number, leaf.grad)
            accumulator.count()
    borders.drop(index + 1, len(batches))
    return accumulator.result()


class _Named(nn.Module):
    """A block that answers to the qualified names of the whole model."""

    def __init__(self, block: nn.Module, prefix: str) -> None:
        super().__init__()
        self._block = block
        self._prefix = prefix
        self._entrance = nn.Identity()  # the input requires gradients by itself

    def get_submodule(self, target: str) -> nn.Module:
        return self._block.get_submodule(target.removeprefix(self._prefix))

    def get_input_embeddings(self) -> nn.Module:
        return self._entrance


class _Borders:
    """Hidden states by border and batch, one safetensors file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, border: int, batch: int, hidden: torch.Tensor) -> None:
        with new_tensor_file(self._folder / "new", {"hidden": hidden}) as new:
            new.replace(self._path(border, batch))

    def get(self, border: int, batch: int, device: torch.device) -> torch.Tensor:
        return load_file(self._path(border, batch))["hidden"].to(device)

    def drop(self, border: int, batches: int) -> None:
        for batch in range(batches):
            self._path(border, batch).unlink()

    def _path(self, border: int, batch: int) -> Path:
        return self._folder / f"{border}.{batch}.safetensors"


@dataclass(frozen=True)
class BlockShape:
    """A decoder with gated MLP: what the memory of streaming it depends on.

    Attributes:
        key_value: outputs of k and of v together are twice this.
        tied: whether the head is the embedding.
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
        """Weights of one block, norms left out."""
        return self.bytes_per_weight * sum(out * into for out, into in self.shapes)

    @property
    def table_bytes(self) -> int:
        """Weights of the embedding."""
        return self.bytes_per_weight * self.vocabulary * self.hidden

    @property
    def model_bytes(self) -> int:
        """Weights of the whole model, norms and biases left out."""
        return self.blocks * self.block_bytes + (1 if self.tied else 2) * self.table_bytes


@dataclass(frozen=True)
class Footprint:
    """Bytes of the phases of `stream` with a two-sided `lowrank` decomposition of every site.

    Attributes:
        ends: embedding or head with one row of logits, its softmax, cumulative sum and gradients in float32.
        collecting: a block, its moments, and the activations of one batch with their gradients.
        decomposing: a block, its moments, and the float64 workspace of its largest site.
        scratch: hidden states on disk.
    """

    ends: int
    collecting: int
    decomposing: int
    scratch: int

    @property
    def peak(self) -> int:
        """Bytes of memory over those of the libraries."""
        return max(self.ends, self.collecting, self.decomposing)


def footprint(shape: BlockShape, tokens: int, batch_tokens: int, row_tokens: int) -> Footprint:
    """What streaming a model needs, from its shape.

    Args:
        tokens: of the calibration text; `batch_tokens` of one batch, `row_tokens` of one row.
    """
    moments = 4 * sum(out**2 + into**2 for out, into in shape.shapes)
    row = row_tokens * shape.vocabulary
    widths = 12 * shape.hidden + 6 * shape.mlp + 4 * shape.key_value  # kept for the backward pass, and its gradients
    return Footprint(
        ends=shape.table_bytes + row * (4 * 4 + 2 * shape.bytes_per_weight),
        collecting=shape.block_bytes + moments + batch_tokens * widths * shape.bytes_per_weight,
        decomposing=shape.block_bytes + moments + max(_workspace(out, into) for out, into in shape.shapes),
        scratch=(shape.blocks + 1) * tokens * shape.hidden * shape.bytes_per_weight,
    )


def _workspace(out: int, into: int) -> int:
    """Bytes that decomposing one site in the two-sided metric needs: two Cholesky factors and, over them, the larger of

    a third square while factorizing, and the matrix in float64 three times while whitening.
    """
    return 8 * (out**2 + into**2) + max(8 * max(out, into) ** 2, 3 * 8 * out * into)

"""Collects statistics of a model too large for memory, one block at a time, and hands them to a callback per block.

The forward pass runs block by block over all calibration batches and keeps the hidden states between blocks on disk.
Then the head computes the gradient of sampled tokens. The backward pass runs block by block from the last, and runs
each block again with gradients on its stored input. Every block is loaded twice, and only one block is in memory at a
time. The second moments are those of `compression.calibration.statistics.collect` with equally weighted tokens, and are
computed by the same code.

Knows torch modules and token batches; does not know where a block's weights come from or how a block is called, which
is up to the given `BlockwiseModel`.
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
from compression.storage.temporary_names import temporary_folder
from compression.storage.tensor_files import new_tensor_file

__all__ = ["Batch", "BlockShape", "BlockwiseModel", "Footprint", "footprint", "stream"]

Batch = tuple[torch.Tensor, torch.Tensor]


class BlockwiseModel(Protocol):
    """Describes a causal language model that loads its parts on request. Its parameters require no gradients.

    Attributes:
        prefix: qualified name of the list of blocks; block i of the whole model is `prefix.i`.
        sites: the sites of the whole model.
        blocks: number of blocks.
    """

    prefix: str
    sites: tuple[Site, ...]
    blocks: int

    def embedding(self) -> AbstractContextManager[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """Returns a context with a function (input_ids, mask) → input of block 0 (batch, length, width).

        The weights are freed when the context ends.
        """

    def block(self, index: int) -> nn.Module:
        """Returns block `index` with its weights, in evaluation mode. The caller holds the only reference."""

    def run(self, index: int, block: nn.Module, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns the output of a block for its input, differentiable."""

    def head(self) -> AbstractContextManager[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """Returns a context with a differentiable function (output of the last block, mask) → logits.

        The weights are freed when the context ends.
        """


def stream(
    model: BlockwiseModel,
    batches: Sequence[Batch],
    generator: torch.Generator,
    visit: Callable[[nn.Module, tuple[Site, ...], Statistics], None],
    scratch: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Collect the statistics of every block and pass them to `visit`, last block first.

    Args:
        model: loads the blocks.
        batches: batches as for `compression.calibration.statistics.collect`. Splitting or merging batches of equal
            length does not change which tokens are sampled; the order of the rows does.
        generator: draws the sampled tokens; on the model's device.
        visit: called with a block, its sites and their statistics. Anything it keeps stays in memory.
        scratch: folder for the hidden states, which take (1 + blocks) × tokens × width numbers; None means the system's
            folder for temporary files. All files are removed at the end.
        progress: called with the number of block passes done, out of 2·blocks.

    Raises:
        ValueError: there is no token, or a statistic is not finite.
        OSError: the scratch folder cannot be written or is full.
    """
    with temporary_folder(scratch or Path(tempfile.gettempdir()), "chisel.borders") as folder:
        borders = _Borders(folder)
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
    """Store the hidden states at every border: 0 before the first block, `model.blocks` after the last."""
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
    """Replace the last hidden states on disk by their gradients. Memory holds one row of logits at a time."""
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
    """Returns the statistics of one block, and replaces its inputs on disk by their gradients."""
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
    """Wraps a block so that its submodules are found by their qualified names in the whole model."""

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
    """Stores hidden states by border between blocks and by batch, one safetensors file each."""

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
        scratch=(shape.blocks + 1) * tokens * shape.hidden * shape.bytes_per_weight,
    )


def _workspace(out: int, into: int) -> int:
    """Returns the bytes that decomposing one site in the two-sided metric needs.

    These are two Cholesky factors, plus the larger of a third square matrix while factorizing and three float64 copies
    of the weight while whitening.
    """
    return 8 * (out**2 + into**2) + max(8 * max(out, into) ** 2, 3 * 8 * out * into)

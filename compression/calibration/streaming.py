"""Collects statistics one block at a time and hands them to a callback per block, so that memory holds one block's.

The forward pass runs block by block over all calibration batches and keeps the hidden states between blocks on disk.
Then the head computes the gradient of sampled tokens. The backward pass runs block by block from the last, and runs
each block again with gradients on its stored input. The second moments are those of
`compression.calibration.statistics.collect`, and are computed by the same code; with weights, the backward pass runs
each block twice.

Knows torch modules and token batches; does not know where a block's weights come from or how a block is called, which
is up to the given `BlockwiseModel`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import nn

from compression.calibration.statistics import MomentAccumulator, Statistics, sampled_gradient
from compression.sites import Site
from compression.storage.temporary_names import temporary_folder
from compression.storage.tensor_files import new_tensor_file

__all__ = ["Batch", "BlockwiseModel", "passes", "stream"]

_HIDDEN, _GRADIENT = "hidden", "gradient"

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


def passes(blocks: int, batches: int, weighted: bool = False) -> int:
    """Returns the number of passes of a batch through a block, or the head, that `stream` makes."""
    return batches * (1 + (3 if weighted else 2) * blocks)


def stream(
    model: BlockwiseModel,
    batches: Sequence[Batch],
    generator: torch.Generator,
    visit: Callable[[nn.Module, tuple[Site, ...], Statistics], None],
    scratch: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
    weighted: bool = False,
    kept: Path | None = None,
) -> None:
    """Collect the statistics of every block and pass them to `visit`, last block first.

    Args:
        model: loads the blocks.
        batches: batches as for `compression.calibration.statistics.collect`. Splitting or merging batches of equal
            length does not change which tokens are sampled; the order of the rows does.
        generator: draws the sampled tokens; on the model's device.
        visit: called with a block, its sites and their statistics. Anything it keeps stays in memory.
        scratch: folder for the hidden states, which take (3 + blocks) × tokens × width numbers; None means the system's
            folder for temporary files. All files are removed at the end.
        progress: called with the number of passes done, out of `passes`.
        weighted: whether tokens are weighted, as in the second pass of `collect`.
        kept: folder for the hidden states instead, which stays when the process ends early. The next call with the same
            arguments then continues: it computes what is missing, and visits only blocks that were not visited.

    Raises:
        ValueError: there is no token, or a statistic is not finite.
        OSError: the scratch folder cannot be written or is full.
    """
    with ExitStack() as stack:
        if kept is None:
            folder = stack.enter_context(temporary_folder(scratch or Path(tempfile.gettempdir()), "chisel.borders"))
        else:
            (folder := kept).mkdir(parents=True, exist_ok=True)
        borders, count = _Borders(folder), _Count(progress)
        last = model.blocks
        if not any(borders.visited(index) for index in range(last)):
            _forward(model, batches, borders, count)
            _turn(model, batches, borders, generator, count)
        for index in reversed(range(last)):
            count.done = len(batches) * (1 + last + (2 if weighted else 1) * (last - 1 - index))
            if borders.visited(index):
                continue
            block = model.block(index)
            sites = tuple(site for site in model.sites if site.block == index)
            first = _backward(model, index, block, sites, batches, borders, count) if weighted else None
            statistics = _backward(model, index, block, sites, batches, borders, count, first)
            visit(block, sites, statistics)
            borders.visit(index, len(batches))
            del block, first, statistics
        if kept is not None:
            shutil.rmtree(kept)


class _Count:
    """Counts passes."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self._progress = progress
        self.done = 0

    def one(self) -> None:
        self.done += 1
        self._progress(self.done)


@torch.no_grad()
def _forward(model: BlockwiseModel, batches: Sequence[Batch], borders: _Borders, count: _Count) -> None:
    """Store the hidden states at every border: 0 before the first block, `model.blocks` after the last."""
    numbered = list(enumerate(batches))
    if not all(borders.has(_HIDDEN, 0, number) for number, _ in numbered):
        with model.embedding() as embed:
            for number, (input_ids, mask) in numbered:
                borders.put(_HIDDEN, 0, number, embed(input_ids, mask))
    for index in range(model.blocks):
        block = None
        for number, (_, mask) in numbered:
            if not borders.has(_HIDDEN, index + 1, number):
                block = block or model.block(index)
                hidden = borders.get(_HIDDEN, index, number, mask.device)
                borders.put(_HIDDEN, index + 1, number, model.run(index, block, hidden, mask))
            count.one()
        del block


def _turn(
    model: BlockwiseModel, batches: Sequence[Batch], borders: _Borders, generator: torch.Generator, count: _Count
) -> None:
    """Store the gradients of the last hidden states. Memory holds one row of logits at a time."""
    last = model.blocks
    with model.head() as head:
        for number, (_, mask) in enumerate(batches):
            if borders.has(_GRADIENT, last, number):
                generator.set_state(borders.drawn(last, number))
                count.one()
                continue
            gradients = []
            states = borders.get(_HIDDEN, last, number, mask.device)
            for hidden, row in zip(torch.split(states, 1), torch.split(mask, 1), strict=True):
                leaf = hidden.detach().requires_grad_()
                logits = head(leaf, row)
                logits.backward(sampled_gradient(logits.detach(), row, generator))  # type: ignore[no-untyped-call]
                assert leaf.grad is not None
                gradients.append(leaf.grad)
            borders.put(_GRADIENT, last, number, torch.cat(gradients), generator.get_state())
            count.one()


def _backward(
    model: BlockwiseModel,
    index: int,
    block: nn.Module,
    sites: tuple[Site, ...],
    batches: Sequence[Batch],
    borders: _Borders,
    count: _Count,
    first: Statistics | None = None,
) -> Statistics:
    """Returns the statistics of one block, and stores the gradients of its inputs."""
    accumulator = MomentAccumulator(_Named(block, f"{model.prefix}.{index}."), sites, first)
    with accumulator:
        for number, (_, mask) in enumerate(batches):
            accumulator.expect(mask)
            leaf = borders.get(_HIDDEN, index, number, mask.device).requires_grad_()
            output = model.run(index, block, leaf, mask)
            output.backward(borders.get(_GRADIENT, index + 1, number, mask.device))  # type: ignore[no-untyped-call]
            assert leaf.grad is not None
            borders.put(_GRADIENT, index, number, leaf.grad)
            accumulator.count()
            count.one()
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
    """Stores hidden states and their gradients by border between blocks and by batch, one safetensors file each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, kind: str, border: int, batch: int, values: torch.Tensor, drawn: torch.Tensor | None = None) -> None:
        """Store values, and the state of a generator after them."""
        tensors = {"values": values} if drawn is None else {"values": values, "drawn": drawn}
        with new_tensor_file(self._folder / "new", tensors) as new:
            new.replace(self._path(kind, border, batch))

    def has(self, kind: str, border: int, batch: int) -> bool:
        return self._path(kind, border, batch).exists()

    def get(self, kind: str, border: int, batch: int, device: torch.device) -> torch.Tensor:
        return load_file(self._path(kind, border, batch))["values"].to(device)

    def drawn(self, border: int, batch: int) -> torch.Tensor:
        return load_file(self._path(_GRADIENT, border, batch))["drawn"]

    def visited(self, index: int) -> bool:
        return (self._folder / f"{index}.visited").exists()

    def visit(self, index: int, batches: int) -> None:
        """Note that a block is done with, and remove what only this block needs."""
        (self._folder / f"{index}.visited").touch()
        for batch in range(batches):
            self._path(_HIDDEN, index + 1, batch).unlink(missing_ok=True)
            self._path(_GRADIENT, index + 1, batch).unlink(missing_ok=True)

    def _path(self, kind: str, border: int, batch: int) -> Path:
        return self._folder / f"{kind}.{border}.{batch}.safetensors"

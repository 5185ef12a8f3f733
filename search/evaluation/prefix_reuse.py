"""Store hidden states between the blocks of a decoder, so that a later forward pass can skip its first blocks.

Two schedules that agree on the first blocks have the same hidden states after them. Knows the list of blocks of a model
and a key for the choices up to each block; does not know the meaning of the states or scores.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

from compression.refusal import Refusal
from compression.schedule import Schedule
from compression.sites import Site

__all__ = ["HiddenStates", "prefix_keys"]

Result = TypeVar("Result")


def prefix_keys(schedule: Schedule, sites: Sequence[Site], blocks: int) -> list[bytes]:
    """A key of the choices in each block and all blocks before it (blocks,).

    Schedules with equal keys for a block have equal hidden states after it.
    """
    choices: list[list[object]] = [[] for _ in range(blocks)]
    for site in sites:
        choices[site.block].append((site.name, schedule[site.name]))
    digest = hashlib.sha256()
    keys = []
    for of_block in choices:
        digest.update(repr(of_block).encode())
        keys.append(digest.digest())
    return keys


@dataclass(eq=False)
class _Run:
    """The stored outputs of one forward pass, by prefix key of the block."""

    batch: Hashable
    outputs: dict[bytes, Any] = field(default_factory=dict)
    size: int = 0


class HiddenStates:
    """Stores block outputs of one model for the batches seen; least recently used passes are dropped first.

    A pass skips the first blocks if an earlier pass stored their output for the same batch and the same choices. The
    skipped blocks return the stored output instead of running. This assumes nothing about how the model calls its
    blocks or what they return, only that a block influences others through its return value alone; `verify` tests that
    on the model.

    All block outputs are stored if two passes over everything that is measured fit into the limit: the one to compare
    with and the current one. Otherwise the output of every k-th block is stored, with the smallest k that fits, and a
    pass starts after the last stored block. If no k fits, nothing is stored.

    Args:
        model: a model with its blocks in one `nn.ModuleList`, which is found through the names of the sites.
        sites: the sites of the model.
        tokens: number of positions in all batches together, padding included.
        limit: most bytes of stored outputs, at least 0; 0 turns reuse off.

    Attributes:
        sites: as given.
        blocks_skipped, blocks_run: numbers of blocks skipped and computed in all passes so far.

    Raises:
        ValueError: the limit is negative, or the sites do not lie in a common list of blocks.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], tokens: int, limit: int) -> None:
        if limit < 0:
            raise Refusal(f"the limit of stored hidden states must be at least 0 bytes, got {limit}")
        self._model = model
        self.sites = tuple(sites)
        self._list = _block_list(model, sites)
        self._tokens = tokens
        self._limit = limit
        self._stride: int | None = None
        self._runs: list[_Run] = []  # least recently used first
        self._known: list[tuple[object, object]] = []
        self.blocks_skipped = self.blocks_run = 0

    @property
    def blocks(self) -> int:
        """Number of blocks of the model."""
        return len(self._list)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the outputs stored now."""
        return sum(run.size for run in self._runs)

    def forget(self) -> None:
        """Drop all stored outputs."""
        self._runs.clear()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Context in which the caller may change the model, as long as the prefix keys identify the changes.

        On entry, all stored outputs are dropped if the model was changed outside such a context: if a module,
        parameter or buffer was replaced or modified, or a hook was added or removed.
        """
        if self._limit:
            seen = self._fingerprint()
            same = len(seen) == len(self._known) and all(
                thing is known and state == before
                for (thing, state), (known, before) in zip(seen, self._known, strict=True)
            )
            if not same:
                self.forget()
        try:
            yield
        finally:
            if self._limit:
                self._known = self._fingerprint()

    def verify(self) -> bool:
        """Test on a few tokens whether a pass that skips blocks gives the same logits as a full pass, bit for bit.

        Otherwise reuse is turned off. This happens if blocks share more than their outputs, modify their input in
        place, or are random.
        """
        if not self._limit:
            return False
        ids = torch.arange(8, device=next(self._model.parameters()).device)[None]
        keys = [str(number).encode() for number in range(self.blocks)]
        middle, run = (self.blocks + 1) // 2, _Run(None)

        def logits(ids: torch.Tensor) -> torch.Tensor:
            result = self._model(input_ids=ids, use_cache=False).logits
            assert isinstance(result, torch.Tensor)
            return result

        with torch.inference_mode():
            with self._recording(run, keys, lambda number, output: number == middle - 1):
                whole = logits(ids)
            logits(ids.flip(1))  # overwrites any state that blocks keep from the first pass besides their output
            with self._skipping(middle, run.outputs[keys[middle - 1]]):
                equal = torch.equal(logits(ids), whole)
        if not equal:
            self._limit = 0
        return equal

    def __call__(self, keys: Sequence[bytes], batch: Hashable, forward: Callable[[], Result]) -> Result:
        """Call `forward`, one pass of the model over `batch`, and skip the blocks whose output is stored.

        Args:
            keys: prefix keys of the schedule applied to the model, see `prefix_keys`.
            batch: identifies the inputs: equal batches must have equal inputs.
        """
        if not self._limit:
            return forward()
        run = _Run(batch)
        start, output = self._find(batch, keys)
        self._runs.append(run)
        try:
            with self._skipping(start, output), self._recording(run, keys[start:], self._wanted, start):
                result = forward()
        except BaseException:
            self.forget()  # memory may have run out
            raise
        self.blocks_skipped += start
        self.blocks_run += self.blocks - start
        return result

    def _find(self, batch: Hashable, keys: Sequence[bytes]) -> tuple[int, Any]:
        """Number of blocks that can be skipped, and the output of the last of them; marks its pass as recently used."""
        for start in range(len(keys), 0, -1):
            for place, run in enumerate(self._runs):
                if run.batch == batch and keys[start - 1] in run.outputs:
                    self._runs.append(self._runs.pop(place))
                    return start, run.outputs[keys[start - 1]]
        return 0, None

    def _wanted(self, number: int, output: Any) -> bool:
        if self._stride is None:
            largest = max(_tensors(output), key=torch.Tensor.numel)
            per_run = _bytes(output) * self._tokens * self.blocks / (largest.numel() / largest.shape[-1])
            self._stride = math.ceil(2 * per_run / self._limit)
        return (number + 1) % self._stride == 0

    @contextmanager
    def _skipping(self, start: int, output: Any) -> Iterator[None]:
        """Context in which the first `start` blocks return `output` without running."""
        skipped = list(self._list)[:start]
        own = [block.__dict__.get("forward") for block in skipped]
        try:
            for block in skipped:
                block.__dict__["forward"] = lambda *args, **kwargs: output
            yield
        finally:
            for block, forward in zip(skipped, own, strict=True):
                block.__dict__.pop("forward", None)
                if forward is not None:
                    block.__dict__["forward"] = forward

    @contextmanager
    def _recording(
        self, run: _Run, keys: Sequence[bytes], wanted: Callable[[int, Any], bool], start: int = 0
    ) -> Iterator[None]:
        """Context in which blocks from `start` on store their wanted outputs in `run`; `keys` starts at that block."""

        def keep(number: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if wanted(number, output):
                    run.outputs[keys[number - start]] = output
                    run.size += _bytes(output)
                    while self.kept_bytes > self._limit and self._runs[0] is not run:
                        self._runs.pop(0)

            return hook

        hooks = [self._list[number].register_forward_hook(keep(number)) for number in range(start, self.blocks)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _fingerprint(self) -> list[tuple[object, object]]:
        """All modules with their hooks, and all parameters and buffers with the version that in-place writes raise."""
        modules = list(self._model.modules())
        tensors = chain.from_iterable((*module._parameters.values(), *module._buffers.values()) for module in modules)
        return [
            *((module, (*module._forward_pre_hooks, *module._forward_hooks)) for module in modules),
            *((each, 0 if each.is_inference() else each._version) for each in tensors if each is not None),
        ]


def _block_list(model: nn.Module, sites: Sequence[Site]) -> nn.ModuleList:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and all(site.name.startswith(f"{name}.{site.block}.") for site in sites):
            return module
    raise Refusal("the sites must lie in a common nn.ModuleList of blocks, and the model has none that holds them all")


def _tensors(output: Any) -> list[torch.Tensor]:
    """The tensors that a block returns, either a single one or a tuple."""
    return [part for part in (output if isinstance(output, tuple) else (output,)) if isinstance(part, torch.Tensor)]


def _bytes(output: Any) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in _tensors(output))

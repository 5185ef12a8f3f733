"""Reuse: hidden states between the blocks of a decoder, kept so that the next forward pass may start later.

Two schedules that agree on the first blocks have the same hidden states behind them. Knows the list of blocks of a
model and names for what precedes each; nothing of what the states mean or of scores.
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
    """For every block a name of its choices and all before, (blocks,): equal names, equal hidden states behind it."""
    choices: list[list[object]] = [[] for _ in range(blocks)]
    for site in sites:
        choice = schedule[site.name]
        choices[site.block].append((site.name, choice.topology, choice.chi, choice.metric))
    digest = hashlib.sha256()
    keys = []
    for of_block in choices:
        digest.update(repr(of_block).encode())
        keys.append(digest.digest())
    return keys


@dataclass(eq=False)
class _Run:
    """What one forward pass left behind: the output of blocks by prefix key."""

    batch: Hashable
    outputs: dict[bytes, Any] = field(default_factory=dict)
    size: int = 0


class HiddenStates:
    """Outputs of the blocks of one model for batches seen before, least recently used runs dropped first.

    A pass skips all blocks whose prefix has been computed for its batch, by whatever earlier pass. The skipped blocks
    return the kept output instead of running, so nothing is assumed about how the model calls them or what they return,
    only that blocks talk to one another through what they return. `verify` tests that on the model at hand.

    The limit has room for two runs over everything that is measured, the one to compare with and the current one. Where
    it would not, the output of every k-th block is kept, with the least k that fits, and the pass starts at the last
    kept one; where no k fits, nothing is.

    Args:
        model: holds its blocks in one `nn.ModuleList`, found through the names of the sites.
        sites: of the model.
        tokens: positions in all batches together, padding included.
        limit: bytes of kept outputs, at least 0; 0 turns reuse off.

    Attributes:
        sites: as given.
        blocks_skipped, blocks_run: over all passes so far.

    Raises:
        ValueError: a negative limit, or sites that lie in no common list of blocks.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], tokens: int, limit: int) -> None:
        if limit < 0:
            raise Refusal(f"the limit of kept hidden states must be at least 0 bytes, got {limit}")
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
        """How many blocks the model has."""
        return len(self._list)

    @property
    def kept_bytes(self) -> int:
        """Bytes kept now."""
        return sum(run.size for run in self._runs)

    def forget(self) -> None:
        """Drop everything kept."""
        self._runs.clear()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Changes of the model inside this context are the caller's, and named by prefix keys.

        If a module, parameter or buffer was replaced or written to, or a hook added or removed, since the last such
        context, everything kept is dropped.
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
        """Whether a pass that starts in the middle gives the logits of a whole pass, bit for bit, on a few tokens.

        If not (blocks that share more than their outputs, write into their input, or draw at random), reuse is turned
        off.
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
            logits(ids.flip(1))  # overwrites what a block may remember of the first pass besides its output
            with self._skipping(middle, run.outputs[keys[middle - 1]]):
                equal = torch.equal(logits(ids), whole)
        if not equal:
            self._limit = 0
        return equal

    def __call__(self, keys: Sequence[bytes], batch: Hashable, forward: Callable[[], Result]) -> Result:
        """`forward()`, which is one pass of the model over `batch`, without the blocks whose output is known.

        Args:
            keys: of the schedule the model follows now, see `prefix_keys`.
            batch: stands for the inputs; equal batches, equal inputs.
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
            self.forget()  # perhaps there was too little memory
            raise
        self.blocks_skipped += start
        self.blocks_run += self.blocks - start
        return result

    def _find(self, batch: Hashable, keys: Sequence[bytes]) -> tuple[int, Any]:
        """How many blocks may be skipped, and what the last of them gives. Marks the run it comes from as used."""
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
        """The first `start` blocks return `output` at once."""
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
        """Every block from `start` on leaves its output in `run`, if wanted; `keys` begins with that block's."""

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
        """Every module with its hooks; every parameter and buffer with its version, which writing in place raises."""
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
    raise Refusal("the sites lie in no common nn.ModuleList of blocks")


def _tensors(output: Any) -> list[torch.Tensor]:
    """The tensors a block returns, alone or in a tuple."""
    return [part for part in (output if isinstance(output, tuple) else (output,)) if isinstance(part, torch.Tensor)]


def _bytes(output: Any) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in _tensors(output))

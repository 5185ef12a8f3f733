"""Runs single blocks of a model on hidden states that the caller holds.

Knows a model whose blocks pass hidden states from one to the next as their first argument, and token batches; does not
know schedules or statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from torch.utils._pytree import tree_map

from compression.refusal import Refusal
from compression.sites import Site, put_modules

__all__ = ["Batch", "Block", "Widened", "record_blocks"]

Batch = tuple[torch.Tensor, torch.Tensor]
_NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Block:
    """Holds one block and, for every batch, the arguments it is called with besides its hidden states."""

    model: nn.Module
    name: str
    calls: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]

    def forward(self, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states after the block, given those before it."""
        arguments, keywords = self.calls[batch]
        if next(self.model.get_submodule(self.name).parameters()).dtype == hidden.dtype == torch.float32:
            arguments, keywords = tree_map(_widened, (arguments, keywords))
        with self.arithmetic():
            output = self.model.get_submodule(self.name)(hidden, *arguments, **keywords)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def arithmetic(self) -> AbstractContextManager[object]:
        """Returns a context in which matrix products use the precision of the parameters, not of the hidden states."""
        weight = next(self.model.get_submodule(self.name).parameters())
        reduced = weight.dtype in _NARROW
        return torch.autocast(weight.device.type, weight.dtype) if reduced else nullcontext()

    def run(self, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the result of `forward` for every batch."""
        return [self.forward(batch, hidden) for batch, hidden in enumerate(states)]

    def input_of(self, site: Site, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the input of a site; the block runs only up to that site."""

        def stop(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            raise _Reached(arguments[0])

        handle = self.model.get_submodule(site.name).register_forward_pre_hook(stop)
        try:
            self.forward(batch, hidden)
        except _Reached as reached:
            return reached.activations
        finally:
            handle.remove()
        raise Refusal(f"site {site.name} is not reached in its block")

    @contextmanager
    def caught(self, site: Site) -> Iterator[list[torch.Tensor]]:
        """Inside the context, records the inputs of a site: the list grows by one with every run of the block."""
        inputs: list[torch.Tensor] = []
        module = self.model.get_submodule(site.name)
        handle = module.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
        try:
            yield inputs
        finally:
            handle.remove()

    @contextmanager
    def silent(self, sites: Sequence[Site]) -> Iterator[None]:
        """Inside the context, the outputs of some sites are replaced by zero."""
        kept = {site.name: self.model.get_submodule(site.name) for site in sites}
        put_modules(self.model, {site.name: _Zero(site.out_features) for site in sites})
        try:
            yield
        finally:
            put_modules(self.model, kept)


class Widened:
    """Holds the 16-bit tensors of modules in float32 until it is closed, so that what they compute is not rounded.

    The tensors themselves stay what they are; afterwards they hold their former memory again. A context manager.
    """

    def __init__(self) -> None:
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for tensor, data in reversed(self._before):
            tensor.data = data
        self._before.clear()

    def take(self, module: nn.Module) -> nn.Module:
        """Put the tensors of a module into float32; returns the module."""
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.dtype in _NARROW:
                self._before.append((tensor, tensor.data))
                tensor.data = tensor.data.float()
        return module


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _NARROW else value


class _Reached(Exception):
    """Stops a forward pass once the activations are known."""

    def __init__(self, activations: torch.Tensor) -> None:
        super().__init__()
        self.activations = activations


class _Zero(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        return activations.new_zeros(*activations.shape[:-1], self.features)


def record_blocks(
    model: nn.Module, names: Sequence[str], batches: Sequence[Batch]
) -> tuple[list[Block], list[torch.Tensor]]:
    """Returns the named blocks, in the order they run, and the float32 hidden states before the first one, by batch.

    In 16-bit precision, the rounding errors of activations in the thousands would exceed the differences of interest.
    The blocks compute only in a first run with a single token; while the batches pass they only record their arguments.
    """
    modules = [model.get_submodule(name) for name in names]
    calls: list[list[tuple[tuple[Any, ...], Mapping[str, Any]]]] = [[] for _ in names]
    states: list[torch.Tensor] = []
    wrapped: list[bool] = []  # whether each block returns a tuple

    def recorder(number: int) -> Callable[..., object]:
        def forward(hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> object:
            calls[number].append((arguments, keywords))
            if number == 0:
                states.append(hidden.float() if hidden.dtype.itemsize < 4 else hidden)
            return (hidden,) if wrapped[number] else hidden

        return forward

    def run(input_ids: torch.Tensor, mask: torch.Tensor) -> None:
        model(input_ids=input_ids, attention_mask=mask.long(), use_cache=False, logits_to_keep=1)

    hooks = [
        module.register_forward_hook(lambda module, arguments, output: wrapped.append(isinstance(output, tuple)))
        for module in modules
    ]
    try:
        run(batches[0][0][:1, :1], batches[0][1][:1, :1])
    finally:
        for hook in hooks:
            hook.remove()
    forwards = [module.__dict__.get("forward") for module in modules]
    try:
        for number, module in enumerate(modules):
            module.forward = recorder(number)
        for batch in batches:
            run(*batch)
    finally:
        for module, forward in zip(modules, forwards, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward
    return [Block(model, name, each) for name, each in zip(names, calls, strict=True)], states

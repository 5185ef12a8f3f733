"""Records the blocks of a model as CUDA graphs, for thousands of passes of the same shape.

Knows the module tree of a torch model whose blocks are called with tensors and constants; does not know losses. The
forward and backward pass of a factorized block launches about a hundred small kernels. A CPU launches them more slowly
than a GPU finishes them; a graph launches them all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

__all__ = ["replayed"]

Recorder = Callable[[tuple[nn.Module, ...], tuple[tuple[torch.Tensor, ...], ...]], Sequence[Callable[..., Any]]]


@contextmanager
def replayed(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    input_ids: torch.Tensor,
    record: Recorder = torch.cuda.make_graphed_callables,
) -> Iterator[None]:
    """Inside the context, passes with the shape of `input_ids` replay the recorded blocks; other passes run normally.

    Enter the context under the conditions of the passes: the same autocast, with its weight cache disabled, and the
    same gradient mode. Inside it, parameters may be overwritten but not replaced, and gradients must be set to zero,
    not to None: a gradient that is None would take over the memory that the next replay writes to.

    Args:
        blocks: blocks of the model, in the order they run.
        input_ids: (rows, length), any tokens; only the shape matters.
        record: turns each module and its sample arguments into a function of tensors.

    Raises:
        RuntimeError: a block does something that a graph cannot record, such as reading a value back to the CPU; or
            does not run exactly once per pass; or memory ran out.
    """
    calls = _calls(model, blocks, input_ids)
    if [call.block for call in calls] != list(blocks):
        raise RuntimeError("each block must run exactly once per pass, in the given order")
    # Gradients accumulate on another stream than the one the blocks were recorded on; torch would warn about it.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    functions = record(tuple(calls), tuple(call.samples for call in calls))
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block, call, function in zip(blocks, calls, functions, strict=True):
            block.forward = call.dispatcher(function)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


class _Call(nn.Module):
    """Wraps a block as a function of its tensor arguments; its other arguments are fixed to the recorded ones."""

    def __init__(self, block: nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.block = block
        self.training = block.training  # not train(), which would also change the submodules
        self._plain, self._spec = block.forward, spec
        self._constants = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._given = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        self.samples = tuple(
            leaf.detach().clone().requires_grad_(leaf.requires_grad)
            for leaf in leaves
            if isinstance(leaf, torch.Tensor)
        )

    def forward(self, *tensors: torch.Tensor) -> Any:
        left = iter(tensors)
        leaves = [
            next(left) if given else constant for given, constant in zip(self._given, self._constants, strict=True)
        ]
        arguments, keywords = pytree.tree_unflatten(leaves, self._spec)
        return self._plain(*arguments, **keywords)

    def dispatcher(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a forward function that uses `function` for calls like the recorded one and the block otherwise."""

        def forward(*arguments: Any, **keywords: Any) -> Any:
            leaves, spec = pytree.tree_flatten((arguments, keywords))
            if spec != self._spec or not self._fits(leaves):
                return self._plain(*arguments, **keywords)
            return function(*(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)))

        return forward

    def _fits(self, leaves: Sequence[Any]) -> bool:
        samples = iter(self.samples)
        for leaf, given, constant in zip(leaves, self._given, self._constants, strict=True):
            if isinstance(leaf, torch.Tensor) is not given:
                return False
            if given:
                sample = next(samples)
                if leaf.shape != sample.shape or leaf.dtype != sample.dtype:
                    return False
            elif leaf is not constant and leaf != constant:
                return False
        return True


def _calls(model: nn.Module, blocks: Sequence[nn.Module], input_ids: torch.Tensor) -> list[_Call]:
    """Runs one pass and returns the calls of the blocks, in the order they happened."""
    calls: list[_Call] = []

    def watch(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.append(_Call(block, *pytree.tree_flatten((arguments, keywords))))

    hooks = [block.register_forward_pre_hook(watch, with_kwargs=True) for block in blocks]
    try:
        model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return calls

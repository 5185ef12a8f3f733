"""Slopes: to first order, what a loss does when one site of a model becomes another matrix.

Knows modules and a backward pass that the caller makes; no schedule, no menu and no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

__all__ = ["watch_slopes"]


@contextmanager
def watch_slopes(model: nn.Module, others: Mapping[str, nn.Module]) -> Iterator[dict[str, float]]:
    """Collects ⟨∂loss/∂W, W' − W⟩ for every named site, over all backward passes inside the context.

    With x the inputs of a site, y = W x its outputs and g the loss's gradient there, that is Σ g·(W' x − y) over all
    positions: one more product a site, and no gradient of a matrix is ever formed.

    Args:
        model: called with gradients enabled inside; none of its parameters needs one.
        others: by site name, what would take its place, a module with the same shapes.

    Returns:
        The sums by name, growing with every backward pass; 0 for a site that no loss depends on.
    """
    sums = dict.fromkeys(others, 0.0)

    def watcher(name: str) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if not output.requires_grad:
                return
            with torch.no_grad():
                change = others[name](args[0]) - output

            def add(gradient: torch.Tensor) -> None:
                sums[name] += float((gradient * change).sum(dtype=torch.float64))

            output.register_hook(add)  # type: ignore[no-untyped-call]

        return watch

    def track(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output.requires_grad_(True)

    with ExitStack() as stack:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        stack.callback(embedding.register_forward_hook(track).remove)
        for name in others:
            stack.callback(model.get_submodule(name).register_forward_hook(watcher(name)).remove)
        wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in wanted:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        with torch.enable_grad():
            yield sums

"""Measures slopes: the first-order change of a loss when the matrix of one site is replaced by another one.

Knows modules and a backward pass that the caller runs; does not know schedules, menus or losses.
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

    With inputs x of a site, outputs y = W x and the gradient g of the loss with respect to y, the slope is
    Σ g·(W' x − y) over all positions. This costs one more product per site and forms no gradient of a matrix.

    Args:
        model: call it inside the context, where gradients are enabled. Its parameters receive no gradients.
        others: the replacement of each site, by site name; a module with the same shapes.

    Yields:
        The sums by site name, which grow with every backward pass; 0 for a site that no loss depends on.
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

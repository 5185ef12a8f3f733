"""Measures slopes: the first-order change of a loss when a site or a unit of sites is replaced by another one.

Knows modules and a backward pass that the caller runs; does not know schedules, menus or losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["watch_slopes"]


@contextmanager
def watch_slopes(model: nn.Module, others: Mapping[str, nn.Module]) -> Iterator[dict[str, float]]:
    """Collects the slope of every named module, over all backward passes inside the context.

    With inputs x of a module, outputs y and the gradient g of the loss with respect to y, the slope is Σ g·(y' − y)
    over all positions, where y' is what the replacement makes of x. For a matrix W that is ⟨∂loss/∂W, W' − W⟩. This
    costs one more pass through the module and forms no gradient of a matrix.

    Args:
        model: call it inside the context, where gradients are enabled. Its parameters receive no gradients.
        others: the replacement of each module, by name; takes the same arguments. If a module returns a tuple, its
            first entry counts.

    Yields:
        The sums by name, which grow with every backward pass; 0 for a module that no loss depends on.
    """
    sums = dict.fromkeys(others, 0.0)

    def watcher(name: str) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> None:
            output = _first(found)
            if not output.requires_grad:
                return
            with torch.no_grad():
                change = _first(others[name](*args, **kwargs)) - output

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
            stack.callback(model.get_submodule(name).register_forward_hook(watcher(name), with_kwargs=True).remove)
        wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in wanted:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        with torch.enable_grad():
            yield sums


def _first(output: Any) -> torch.Tensor:
    first: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return first

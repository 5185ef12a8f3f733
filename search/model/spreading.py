"""Spread the blocks of a model over several devices.

Everything outside the blocks stays on the main device, where inputs are given and logits are read. Hooks move the
inputs of a block to the device of its parameters, and those of the modules after the last block back to the main one.
accelerate's own hooks replace the `forward` of every module and so get in the way of the code that records, skips and
replays blocks here. The hooks of this module belong to the blocks, so that matrices inside can be replaced, and look up
the device at every call, so that a copy of the model works by itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from accelerate.utils import get_max_memory, send_to_device  # type: ignore[import-untyped]
from torch import nn

from compression.refusal import Refusal
from compression.sites import find_blocks, model_bytes
from search.model.devices import resolve_device

__all__ = ["devices_of", "is_spread", "spread_"]

_SHARE = 0.8
"""Share of the free memory of a device that weights may take; the rest is for activations and statistics."""


def devices_of(device_map: str, main: torch.device) -> tuple[torch.device, ...]:
    """The devices that a `device_map` names: all GPUs for "auto", or the main device if there is none.

    Raises:
        ValueError: a device does not exist, or is of another type than the main device.
    """
    if device_map == "auto":
        count = torch.cuda.device_count() if main.type == "cuda" else 0
        return tuple(torch.device(f"cuda:{number}") for number in range(count)) or (main,)
    found = tuple(resolve_device(name) for name in device_map.split(","))
    if other := next((device for device in found if device.type != main.type), None):
        raise Refusal(f"device_map must name devices of the type of {main}, the main device, and names {other}")
    return found


def spread_(model: Any, main: torch.device, devices: Sequence[torch.device]) -> None:
    """Move the blocks of a model to several devices, in order and in proportion to free memory, all else to `main`.

    Raises:
        ValueError: the devices have too little free memory for the weights.
    """
    prefix, blocks = find_blocks(model)
    outside = model_bytes(model) - model_bytes(blocks)
    free = get_max_memory()
    rooms = [_SHARE * float(free["cpu"] if device.type == "cpu" else free[device.index]) for device in devices]
    if main in devices:
        rooms[devices.index(main)] -= outside
    rooms = [max(0.0, room) for room in rooms]
    if (needed := model_bytes(blocks)) > sum(rooms):
        raise Refusal(
            f"device_map must give room to the blocks of the model, {needed / 1e9:.1f} GB, and these devices have "
            f"{sum(rooms) / 1e9:.1f} GB to spare; name more devices, or use --dtype bfloat16"
        )
    model.set_submodule(prefix, nn.ModuleList())
    model.to(main)
    for module in [module for module in model.modules() if not any(True for _ in module.children())]:
        module.register_forward_pre_hook(_follow, with_kwargs=True)
    model.set_submodule(prefix, blocks)
    for block, place in zip(blocks, _places(len(blocks), rooms), strict=True):
        block.to(devices[place])
        block.register_forward_pre_hook(_follow, with_kwargs=True)


def _places(count: int, rooms: Sequence[float]) -> list[int]:
    """The device of each of `count` blocks, in order and in proportion to the rooms."""
    borders = [border / sum(rooms) for border in accumulate(rooms)]
    return [bisect_left(borders[:-1], (number + 0.5) / count) for number in range(count)]


def is_spread(model: nn.Module) -> bool:
    """Whether the parameters of a model are on more than one device."""
    return len({parameter.device for parameter in model.parameters()}) > 1


def _follow(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
    """Move the tensors of a call, except those in caches, to the device of the module's first parameter or buffer."""
    first = next((tensor for group in (module.parameters(), module.buffers()) for tensor in group), None)
    if first is None:
        return arguments, named
    moved: tuple[Any, Any] = send_to_device((arguments, named), first.device, skip_keys=["past_key_values"])
    return moved

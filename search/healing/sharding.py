"""Sharding: models whose blocks are spread over the processes that train together (FSDP, `fully_shard` of torch).

Knows module trees and torch.distributed; nothing of losses. A block is whole only while it is computed, forwards or
backwards. Embeddings and the output head stay whole in every process.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import distributed, nn

from compression.sites import find_blocks

__all__ = ["Sharding", "like", "sharing_copy", "whole"]


class Sharding:
    """A compressed and a dense model sharded in place, until `end`; optimizers are made in between.

    Gradients are summed over the processes, which must make the same passes. What the modules held before stays with
    them in the memory of the machine.

    Args:
        model: what is to be trained already asks for gradients.
        dense: has blocks at the same places; may share tensors with `model`.

    Raises:
        ValueError: no list of blocks.
    """

    def __init__(self, model: nn.Module, dense: nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.device = next(model.parameters()).device
        count = distributed.get_world_size()
        mesh = init_device_mesh(self.device.type, (count,))
        self._plain: list[tuple[nn.Module, str, nn.Module]] = []
        prefix, blocks = find_blocks(dense)
        inner = [f"{prefix}.{number}" for number in range(len(blocks))]
        for each in (model, dense):
            for name in (*inner, *_outer(each, prefix)):
                plain = each.get_submodule(name)
                shard = sharing_copy(plain)
                each.set_submodule(name, shard)
                fully_shard(
                    shard,
                    mesh=mesh,
                    reshard_after_forward=True,
                    shard_placement_fn=lambda parameter: _placement(parameter, count),
                )
                shard.set_gradient_divide_factor(1.0)
                shard.set_force_sum_reduction_for_comms(True)
                self._plain.append((each, name, plain))
        for _, _, plain in self._plain:
            plain.to("cpu")

    def end(self) -> None:
        """The modules from before in their places; what was trained meanwhile is not in them."""
        for model, name, plain in self._plain:
            model.set_submodule(name, plain.to(self.device))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be sharded, as one; all processes ask for it together."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A whole tensor, placed and sharded as `other` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements) if isinstance(other, DTensor) else tensor


def sharing_copy(module: nn.Module) -> Any:
    """The same module tree anew, with the very parameters and buffers of `module`: costs no memory."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def _outer(model: nn.Module, prefix: str) -> list[str]:
    """Names of the modules outside the blocks that hold something to train."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [
        name
        for name, module in model.named_modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        and module is not head
        and not name.startswith(f"{prefix}.")
    ]


def _placement(parameter: nn.Parameter, count: int) -> Any:
    """Along the longest axis that the processes share evenly: the first of a core is often 1."""
    from torch.distributed.tensor import Shard

    even = [axis for axis, size in enumerate(parameter.shape) if size % count == 0]
    return Shard(max(even, key=lambda axis: parameter.shape[axis], default=0))

"""Shard the blocks of models over the processes that train together (FSDP, torch's `fully_shard`).

A process gathers a block only while it computes its forward or backward pass. Embeddings and the output head are
replicated in every process. Knows module trees and torch.distributed; does not know losses.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import distributed, nn

from compression.sites import find_blocks

__all__ = ["Sharding", "like", "sharing_copy", "whole"]


class Sharding:
    """Shards a compressed and a dense model in place until `end`; create optimizers in between.

    Gradients are summed over the processes, which must make the same number of passes. The original modules are kept
    in main memory.

    Args:
        model: the compressed model; the parameters to train must already require gradients.
        dense: the dense model, with its blocks at the same places; it may share tensors with `model`.

    Raises:
        ValueError: the model has no list of blocks.
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
        """Put the original modules back; they do not contain what was trained meanwhile."""
        for model, name, plain in self._plain:
            model.set_submodule(name, plain.to(self.device))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of one that may be sharded; all processes must call this together."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A full tensor, moved and sharded like `other`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements) if isinstance(other, DTensor) else tensor


def sharing_copy(module: nn.Module) -> Any:
    """A copy of the module tree that shares all parameters and buffers with `module` and so costs no memory."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def _outer(model: nn.Module, prefix: str) -> list[str]:
    """Names of the modules outside the blocks, the output head excepted, that have parameters to train."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [
        name
        for name, module in model.named_modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        and module is not head
        and not name.startswith(f"{prefix}.")
    ]


def _placement(parameter: nn.Parameter, count: int) -> Any:
    """Shard along the longest axis whose size `count` divides: the first axis of a core often has size 1."""
    from torch.distributed.tensor import Shard

    even = [axis for axis, size in enumerate(parameter.shape) if size % count == 0]
    return Shard(max(even, key=lambda axis: parameter.shape[axis], default=0))

"""Trains the scales of packed matrices, so that a quantized model learns without changing any of its integers.

Knows packed modules in a module tree; does not know losses or training. During training every scale s is replaced by
s·(1 + c), where c starts at 0; afterwards the product becomes the scale, rounded to float16. Size and file format stay
the same. The second phase of EfficientQAT (Chen et al. 2024) trains scales in the same way, after one that also changes
the integers.
"""

from __future__ import annotations

import torch
from torch import nn

from compression.layers.packed import PackedMatrix

__all__ = ["absorb_changes_", "add_changes_", "packed_ends"]


def add_changes_(model: nn.Module) -> None:
    """Give every packed matrix of `model` a parameter `change` of zeros, in the shape of its scales.

    Embedding and output head get none: healing keeps the head as it is. A model without packed matrices stays the same.
    """
    fixed = {id(matrix) for matrix in packed_ends(model)}
    for matrix in _packed(model):
        if id(matrix) not in fixed:
            zeros = torch.zeros(matrix.scales.shape, device=matrix.scales.device)
            matrix.change = nn.Parameter(zeros, requires_grad=False)


@torch.no_grad()
def absorb_changes_(model: nn.Module) -> None:
    """Multiply every change into its scales and remove it, in place."""
    for matrix in _packed(model):
        if matrix.change is None:
            continue
        scales = matrix.scales.view(torch.float16).float() * (1 + matrix.change.float())
        most = torch.finfo(torch.float16).max
        matrix.scales.copy_(scales.clamp(-most, most).half().view(torch.int16))
        matrix.change = None


def packed_ends(model: nn.Module) -> list[PackedMatrix]:
    """Returns the packed matrices of the token embedding and the output head of `model`."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    found = (getattr(end, "stored", getattr(end, "packed", None)) for end in ends)
    return [matrix for matrix in found if isinstance(matrix, PackedMatrix)]


def _packed(model: nn.Module) -> list[PackedMatrix]:
    return [module for module in model.modules() if isinstance(module, PackedMatrix)]

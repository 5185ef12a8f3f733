"""Linear layers that store a mask and the entries under it."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_model import Conv1D
from torch import nn

from compression.layers.merge import merge_
from compression.layers.sparse_linear import SparseLinear
from compression.training.trainable import trainable_

OUT, IN = 6, 11


def case(bias: bool = True) -> tuple[nn.Linear, torch.Tensor]:
    """A linear layer and a mask, one row of which is empty."""
    torch.manual_seed(0)
    mask = torch.rand(OUT, IN) < 0.4
    mask[2] = False
    return nn.Linear(IN, OUT, bias).requires_grad_(False), mask


@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_the_masked_dense_layer_computes(bias: bool) -> None:
    dense, mask = case(bias)
    layer, rows = SparseLinear.of(dense.weight, mask, dense.bias), torch.randn(2, 3, IN)
    dense.weight.mul_(mask)
    assert torch.equal(layer.weight, dense.weight)
    assert torch.equal(layer(rows), dense(rows))


def test_values_learn_as_entries_of_the_dense_matrix_do_and_the_mask_stays() -> None:
    dense, mask = case()
    model, rows = nn.Sequential(SparseLinear.of(dense.weight, mask, dense.bias)), torch.randn(5, IN)
    before = model[0].bitmask.clone()
    assert set(trainable_(model)) == {"0.values", "0.bias"}
    model(rows).square().sum().backward()
    dense.weight.mul_(mask).requires_grad_(True)
    dense(rows).square().sum().backward()
    torch.testing.assert_close(model[0].values.grad, dense.weight.grad[mask])
    with torch.no_grad():
        model[0].values.sub_(model[0].values.grad)
    assert torch.equal(model[0].bitmask, before)
    assert not model[0].weight[~mask].any()


@pytest.mark.parametrize("transposed", [False, True])
def test_the_dense_form_has_zeros_for_what_was_removed(transposed: bool) -> None:
    dense, mask = case()
    rows, skeleton = torch.randn(4, IN), nn.Sequential(Conv1D(OUT, IN) if transposed else nn.Linear(IN, OUT))
    model = nn.Sequential(SparseLinear.of(dense.weight, mask, dense.bias))
    wanted = model(rows)
    assert merge_(model, copy.deepcopy(skeleton)) == ["0"]
    assert type(model[0]) is type(skeleton[0])
    torch.testing.assert_close(model(rows), wanted)


def test_a_damaged_mask_is_refused() -> None:
    dense, mask = case()
    state = SparseLinear.of(dense.weight, mask).state_dict()
    flipped = state["bitmask"].clone()
    flipped[0, 0] ^= 1
    with pytest.raises(ValueError, match=rf"names {int(mask.sum()) + 1 - 2 * int(mask[0, 0])} entries, but"):
        SparseLinear(state["values"], flipped, IN)
    with pytest.raises(ValueError, match="beyond column 11"):
        SparseLinear(state["values"], state["bitmask"] | 128, IN)

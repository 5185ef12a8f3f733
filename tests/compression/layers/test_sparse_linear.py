"""Linear layers that store a mask and the entries under it."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_model import Conv1D
from torch import nn

from compression.layers.merge import merge_
from compression.layers.planner import Planner
from compression.layers.sparse_linear import SparseLinear
from compression.training.trainable import put_parameters, trainable_

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


def test_a_kept_matrix_computes_the_same_is_not_stored_and_follows_what_is_trained() -> None:
    dense, mask = case()
    model, rows = nn.Sequential(SparseLinear.of(dense.weight, mask, dense.bias)), torch.randn(5, IN)
    wanted, state = model(rows), set(model.state_dict())
    small = Planner("memory").plan_(model)
    kept = Planner("latency").plan_(model)
    assert kept.stored_bytes == small.stored_bytes == small.resident_bytes
    assert kept.resident_bytes == small.resident_bytes + 4 * OUT * IN
    assert torch.equal(model(rows), wanted)
    assert set(model.state_dict()) == state
    torch.testing.assert_close(model.double()(rows.double()), wanted.double(), rtol=1e-5, atol=1e-5)
    put_parameters(model, {"0.values": nn.Parameter(2 * model[0].values, requires_grad=False)})
    assert torch.equal(model[0](rows.double() * 0), model[0].bias.expand(5, OUT))
    doubled = model[0].bias + 2 * (wanted.double() - model[0].bias)
    torch.testing.assert_close(model(rows.double()), doubled, rtol=1e-5, atol=1e-5)


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

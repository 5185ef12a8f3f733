"""Masks of one bit per entry."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compression.numerics.bitmask import bitmask_bytes, pack, places, unpack


@pytest.mark.parametrize("columns", [1, 8, 21])
def test_bits_are_those_of_numpy_in_little_order_and_give_the_mask_back(columns: int) -> None:
    mask = torch.rand(5, columns, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = pack(mask)
    assert np.array_equal(bits.numpy(), np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    assert bits.numel() == bitmask_bytes(5, columns)
    assert torch.equal(unpack(bits, columns), mask)


def test_damaged_bits_are_refused() -> None:
    bits = pack(torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="beyond column 5"):
        unpack(bits | 128, 5)
    with pytest.raises(ValueError, match=r"5 columns has 1 bytes a row, got \(2, 1\) of int32"):
        unpack(bits.int(), 5)
    with pytest.raises(ValueError, match="9 columns has 2 bytes a row"):
        unpack(bits, 9)


@pytest.mark.parametrize("columns", [1, 8, 21])
def test_every_stored_entry_knows_its_place_among_the_values(columns: int) -> None:
    mask = torch.rand(6, columns, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[2] = False
    found = places(pack(mask), columns)
    assert torch.equal(found[mask], torch.arange(1, 1 + int(mask.sum()), dtype=torch.int32))
    assert not found[~mask].any()

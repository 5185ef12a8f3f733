"""Gauge fixing changes no matrix, stores χ² numbers less per bond, and keeps its entries small."""

from __future__ import annotations

import pytest
import torch

from compression.numerics.cores import contract, decompose, truncate
from compression.numerics.gauge import pivot, unpivot
from compression.numerics.legs import Legs, leg_name, resolve

SHAPES = [
    Legs((24, 1), (1, 36)),
    Legs((36, 1), (1, 24)),
    Legs((6, 4), (4, 9)),
    Legs((3, 4, 2), (2, 3, 4)),
    Legs((2, 2, 3, 2), (3, 2, 2, 2)),
    Legs((7, 1), (1, 1)),
]


def cores_of(legs: Legs, chi: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    out, inner = torch.tensor(legs.out_legs).prod(), torch.tensor(legs.in_legs).prod()
    matrix = torch.randn(int(out), int(inner), generator=generator)
    return [core.to(dtype).contiguous() for core in truncate(decompose(matrix, legs)[0], chi)]


@pytest.mark.parametrize("legs", SHAPES, ids=str)
@pytest.mark.parametrize("chi", [1, 3, 8, 10_000])
def test_the_matrix_is_unchanged_and_chi_squared_numbers_are_saved(legs: Legs, chi: int) -> None:
    cores = cores_of(legs, chi)
    pivoted, last = pivot(cores)
    torch.testing.assert_close(contract(unpivot(pivoted, last)), contract(cores), atol=2e-5, rtol=1e-4)
    stored = sum(core.tail.numel() for core in pivoted) + last.numel()
    full = sum(core.numel() for core in cores)
    assert stored == full - sum(core.shape[3] ** 2 for core in cores[:-1])


def test_entries_stay_small_so_that_bfloat16_loses_no_more_than_in_plain_cores() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(200, 60, generator=generator) * torch.logspace(0, -6, 60)
    pivoted, last = pivot([left[None, :, None, :], torch.randn(60, 1, 90, 1, generator=generator)])
    assert pivoted[0].tail.abs().max() <= 1.5
    assert last.dtype == torch.float32


def test_a_rank_below_chi_is_no_obstacle() -> None:
    left = torch.zeros(12, 4)
    left[:, 0] = torch.arange(12)
    right = torch.arange(20.0).reshape(4, 5)
    cores = [left[None, :, None, :], right[:, None, :, None]]
    torch.testing.assert_close(contract(unpivot(*pivot(cores))), contract(cores), atol=1e-4, rtol=1e-4)
    zero = [torch.zeros(1, 12, 1, 4), torch.zeros(4, 1, 5, 1)]
    assert not contract(unpivot(*pivot(zero))).any()


def test_a_bond_larger_than_its_left_side_is_refused() -> None:
    with pytest.raises(ValueError, match="bond of 5"):
        pivot([torch.ones(1, 4, 1, 5), torch.ones(5, 1, 6, 1)])


@pytest.mark.parametrize("legs", SHAPES, ids=str)
@pytest.mark.parametrize("chi", [1, 3, 8, 10_000])
def test_legs_count_what_is_stored(legs: Legs, chi: int) -> None:
    cores = cores_of(legs, chi)
    pivoted, last = pivot(cores)
    counted = Legs(legs.out_legs, legs.in_legs, pivoted=True)
    assert counted.parameters(chi) == sum(core.tail.numel() for core in pivoted) + last.numel()
    assert counted.index_entries(chi) == sum(core.shape[3] for core in pivoted)


def test_a_pivoted_lowrank_matrix_is_smaller_than_dense_at_every_chi_below_full() -> None:
    legs = resolve("pivoted-lowrank", 24, 36)
    assert legs.break_even_chi == 23
    assert legs.parameters(24) == legs.dense_parameters
    assert legs.multiply_adds(10) == 10 * (24 + 36 - 10)


def test_named_legs_resolve_to_themselves() -> None:
    legs = resolve("pivoted-mpo:6.4x4.9", 24, 36)
    assert (legs.out_legs, legs.in_legs, legs.pivoted) == ((6, 4), (4, 9), True)
    assert leg_name(legs) == "pivoted-mpo:6.4x4.9"
    with pytest.raises(ValueError, match="must be 24 and 37"):
        resolve("mpo:6.4x4.9", 24, 37)

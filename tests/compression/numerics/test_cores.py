"""MPO numerics against truth: limits, exact cases, an independent SVD, and the error bound."""

import itertools

import pytest
import torch

from compression import Legs, balanced, contract, contract_with, decompose, resolve, truncate, truncation_error_bound

SHAPES = [
    Legs((4, 6), (3, 8)),
    Legs((2, 3, 4), (3, 2, 5)),
    Legs((2, 3, 2, 2), (3, 2, 1, 4)),
    Legs((24, 1), (1, 24)),
    Legs((7, 1), (5, 1)),
    Legs((1, 1), (1, 6)),
]


def random_matrix(legs: Legs, seed: int = 0) -> torch.Tensor:
    rows = torch.tensor(legs.out_legs).prod().item()
    columns = torch.tensor(legs.in_legs).prod().item()
    return torch.randn(int(rows), int(columns), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("legs", SHAPES, ids=str)
def test_full_chi_is_exact(legs: Legs) -> None:
    matrix = random_matrix(legs)
    cores, _ = decompose(matrix, legs)
    assert torch.allclose(contract(cores), matrix, atol=1e-12)


@pytest.mark.parametrize("legs", SHAPES, ids=str)
def test_cores_have_the_stated_axes_bonds_and_parameter_count(legs: Legs) -> None:
    cores, spectra = decompose(random_matrix(legs), legs)
    assert [core.shape[1] for core in cores] == list(legs.out_legs)
    assert [core.shape[2] for core in cores] == list(legs.in_legs)
    for chi in (1, 2, 3, 100):
        sliced = truncate(cores, chi)
        assert (1, *(core.shape[3] for core in sliced)) == legs.bonds(chi)
        assert sum(core.numel() for core in sliced) == legs.parameters(chi)
    assert [len(spectrum.values) for spectrum in spectra] == list(legs.full_bonds)


@pytest.mark.parametrize("legs", SHAPES, ids=str)
def test_error_of_every_chi_is_within_the_bound_and_never_grows_with_chi(legs: Legs) -> None:
    matrix = random_matrix(legs)
    cores, spectra = decompose(matrix, legs)
    errors = []
    for chi in range(1, max(legs.full_bonds) + 1):
        error = float((matrix - contract(truncate(cores, chi))).norm())
        assert error <= truncation_error_bound(spectra, chi) + 1e-10
        errors.append(error)
    assert all(later <= earlier + 1e-10 for earlier, later in itertools.pairwise(errors))


def test_two_core_truncation_is_the_best_of_its_rank() -> None:
    legs = Legs((4, 6), (3, 8))
    matrix = random_matrix(legs)
    cores, spectra = decompose(matrix, legs)
    unfolded = matrix.reshape(4, 6, 3, 8).permute(0, 2, 1, 3).reshape(12, 48)
    for chi in (1, 3, 7):
        best = torch.linalg.svdvals(unfolded)[chi:].norm()
        assert torch.isclose((matrix - contract(truncate(cores, chi))).norm(), best)
        assert truncation_error_bound(spectra, chi) == pytest.approx(float(best))


def test_lowrank_is_the_truncated_svd() -> None:
    legs = resolve("lowrank", 9, 14)
    matrix = random_matrix(legs)
    cores, _ = decompose(matrix, legs)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.allclose(contract(truncate(cores, 4)), (u[:, :4] * s[:4]) @ vh[:4])
    assert legs.parameters(4) == 4 * (9 + 14)


def test_chi_one_of_two_cores_is_a_kronecker_product() -> None:
    left, right = random_matrix(Legs((3, 1), (1, 2))), random_matrix(Legs((4, 1), (1, 5)), seed=1)
    legs = Legs((3, 4), (2, 5))
    cores, _ = decompose(torch.kron(left, right), legs)
    assert torch.allclose(contract(truncate(cores, 1)), torch.kron(left, right))


@pytest.mark.parametrize("legs", SHAPES, ids=str)
@pytest.mark.parametrize("last_first", [False, True])
def test_contracting_with_activations_equals_the_dense_product(legs: Legs, last_first: bool) -> None:
    matrix = random_matrix(legs)
    cores = truncate(decompose(matrix, legs)[0], 3)
    activations = torch.randn(5, matrix.shape[1], dtype=torch.float64)
    assert torch.allclose(contract_with(cores, activations, last_first), activations @ contract(cores).T)


def test_a_cap_on_chi_bounds_every_bond() -> None:
    legs = Legs((2, 3, 4), (3, 2, 5))
    cores, _ = decompose(random_matrix(legs), legs, max_chi=4)
    assert max(core.shape[3] for core in cores) == 4


def test_break_even_is_the_last_chi_that_saves() -> None:
    for legs in (resolve("lowrank", 576, 1536), resolve("mpo2", 576, 576), resolve("mpo3", 576, 1536)):
        chi = legs.break_even_chi
        assert legs.parameters(chi) < legs.dense_parameters <= legs.parameters(chi + 1)
    assert resolve("lowrank", 1, 7).break_even_chi == 0


def test_balanced_legs_multiply_to_the_dimension() -> None:
    assert balanced(576, 2) == (24, 24)
    assert balanced(1536, 2) == (48, 32)
    assert balanced(13, 3) == (13, 1, 1)
    assert balanced(64, 3) == (4, 4, 4)


def test_multiply_adds_count_the_work_of_the_contraction() -> None:
    legs = resolve("lowrank", 9, 14)
    assert legs.multiply_adds(3) == 3 * (9 + 14)
    legs = Legs((2, 3), (4, 5))  # first core first: 5 rest × 4 × 2 × χ, then 2 done × χ × 5 × 3; or from the other end
    assert legs.multiply_adds_from(2, last_first=False) == 5 * 4 * 2 * 2 + 2 * 2 * 5 * 3
    assert legs.multiply_adds_from(2, last_first=True) == 4 * 5 * 3 * 2 + 3 * 2 * 4 * 2
    assert legs.multiply_adds(2) == min(140, 168)


@pytest.mark.parametrize("topology", ["dense", "mpo1", "mpo", "tucker", "MPO2"])
def test_an_unknown_topology_is_refused_by_name(topology: str) -> None:
    with pytest.raises(ValueError, match=topology):
        resolve(topology, 8, 8)


def test_bad_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="fit"):
        decompose(torch.zeros(3, 4), resolve("lowrank", 4, 3))
    with pytest.raises(ValueError, match="NaN"):
        decompose(torch.full((4, 3), torch.nan), resolve("lowrank", 4, 3))
    with pytest.raises(ValueError, match="at least 1"):
        truncate([torch.zeros(1, 2, 2, 1)] * 2, 0)

"""Truncated SVD against LAPACK in float64: spectra of every kind, the error it claims, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from compression import Legs, contract, decompose, truncate, truncation_error_bound
from compression.numerics.truncated_svd import Spectrum, TruncatedSVD, choose_method, truncated_svd

SHAPES = [(24, 40), (40, 24), (32, 32), (1, 9), (9, 1), (1, 1)]
LARGE = [(520, 600), (600, 520)]


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def graded(rows: int, columns: int, values: torch.Tensor) -> torch.Tensor:
    """A matrix with these singular values."""
    left, right = torch.linalg.qr(gaussian(rows, len(values)))[0], torch.linalg.qr(gaussian(columns, len(values), 1))[0]
    return (left * values) @ right.T


def assert_left_canonical(found: TruncatedSVD, tolerance: float) -> None:
    identity = torch.eye(found.left.shape[1], dtype=found.left.dtype)
    assert torch.allclose(found.left.T @ found.left, identity, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", ["svd", "gram", "subspace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_method_gives_the_truncated_svd(shape: tuple[int, int], method: str, dtype: torch.dtype) -> None:
    matrix = gaussian(*shape).to(dtype)
    exact = torch.linalg.svdvals(matrix.double())
    for chi in {1, (min(shape) + 1) // 2, min(shape)}:
        found = truncated_svd(matrix, chi, method=method)
        assert found.left.shape == (shape[0], chi)
        assert found.right.shape == (chi, shape[1])
        assert found.left.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_left_canonical(found, 1e-5)
        error = float((matrix.double() - found.left.double() @ found.right.double()).norm())
        assert error == pytest.approx(float(exact[chi:].norm()), rel=1e-3, abs=1e-5 * float(exact[0]))
        assert torch.allclose(found.spectrum.values[:chi], exact[:chi], rtol=2e-3)


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_iteration_finds_the_leading_part_of_flat_and_falling_spectra(shape: tuple[int, int], power: float) -> None:
    values = torch.arange(1, 521, dtype=torch.float64).pow(-power)
    matrix = (graded(*shape, values) if power else gaussian(*shape)).float()
    exact = torch.linalg.svdvals(matrix.double())
    assert choose_method(*shape, 40, torch.float32) == "subspace"
    found = truncated_svd(matrix, 40)
    assert len(found.spectrum.values) == 40
    assert_left_canonical(found, 1e-5)
    for chi in (1, 10, 40):
        error = (matrix.double() - found.left[:, :chi].double() @ found.right[:chi].double()).norm()
        assert float(error) <= 1.002 * float(exact[chi:].norm())
        assert float(error) ** 2 == pytest.approx(found.spectrum.discarded(chi), rel=1e-3)
    assert bool((found.spectrum.values <= exact[:40] * (1 + 1e-5)).all())


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_gram_resolves_what_float32_does(shape: tuple[int, int]) -> None:
    """Singular values over ten decades: right to 1e-7 of the largest, as those of a float32 SVD are."""
    values = torch.logspace(0, -10, 520, dtype=torch.float64)
    matrix = graded(*shape, values).float()
    found = truncated_svd(matrix)
    assert_left_canonical(found, 1e-5)
    assert torch.allclose(found.spectrum.values, values, atol=3e-7, rtol=0)
    for chi in (1, 100, 300):
        error = float((matrix.double() - found.left[:, :chi].double() @ found.right[:chi].double()).norm())
        assert error == pytest.approx(float(values[chi:].norm()), rel=0.02, abs=3e-6)


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("chi", [10, 30, None])
def test_rank_deficient_matrices_keep_an_orthonormal_left_factor(shape: tuple[int, int], chi: int | None) -> None:
    matrix = graded(*shape, torch.linspace(2, 1, 20, dtype=torch.float64)).float()
    found = truncated_svd(matrix, chi)
    assert_left_canonical(found, 1e-5)
    expected = float(torch.linspace(2, 1, 20)[chi or 20 :].norm())
    assert float((matrix - found.left @ found.right).norm()) == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_a_zero_matrix_has_zero_error(shape: tuple[int, int]) -> None:
    found = truncated_svd(torch.zeros(shape), 10)
    assert_left_canonical(found, 1e-6)
    assert found.right.abs().max() == 0
    assert found.spectrum.discarded(0) == 0


@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e12, 1e17])
def test_scale_does_not_matter(scale: float) -> None:
    matrix = gaussian(*LARGE[0]).float()
    plain, scaled = truncated_svd(matrix, 20), truncated_svd(matrix * scale, 20)
    assert torch.allclose(scaled.spectrum.values[:20] / scale, plain.spectrum.values, rtol=2e-3)
    assert scaled.spectrum.discarded(20) / scale**2 == pytest.approx(plain.spectrum.discarded(20), rel=2e-3)


def test_the_same_seed_gives_the_same_result() -> None:
    matrix = gaussian(*LARGE[0]).float()
    first, second = truncated_svd(matrix, 20, seed=3), truncated_svd(matrix, 20, seed=3)
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)


def test_a_small_cap_iterates_and_a_large_one_does_not() -> None:
    assert choose_method(4096, 11008, 512, torch.float32) == "subspace"
    assert choose_method(4096, 11008, 2048, torch.float32) == "gram"
    assert choose_method(576, 1536, 418, torch.float32) == "gram"
    assert choose_method(576, 1536, 576, torch.float64) == "svd"


def test_a_capped_decomposition_bounds_the_error_of_every_chi_below() -> None:
    legs = Legs((24, 25), (25, 24))
    matrix = gaussian(600, 600).float()
    cores, spectra = decompose(matrix, legs, 40)
    assert len(spectra[0].values) == 40
    for chi in (1, 20, 40):
        error = float((matrix - contract(truncate(cores, chi))).norm())
        assert error == pytest.approx(truncation_error_bound(spectra, chi), rel=1e-4)


def test_a_closed_spectrum_keeps_the_whole_energy() -> None:
    spectrum = Spectrum(torch.tensor([3.0, 2.0], dtype=torch.float64), 4.0)
    assert spectrum.closed().tolist() == [3, 2, 2]
    assert spectrum.discarded(1) == 8
    assert Spectrum(spectrum.values, 0.0).closed() is spectrum.values


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_matrices_that_are_not_finite_are_refused(bad: float, dtype: torch.dtype) -> None:
    matrix = torch.ones(4, 6, dtype=dtype)
    matrix[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        truncated_svd(matrix)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="rows and columns"):
        truncated_svd(torch.zeros(3, 0))
    with pytest.raises(ValueError, match="rows and columns"):
        truncated_svd(torch.zeros(3))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        truncated_svd(torch.ones(3, 3), 0)

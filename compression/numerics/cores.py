"""Decomposes matrices into MPO cores by sequential SVD, truncates and contracts cores, and bounds the error.

Takes tensors and returns tensors; does not know modules, files or devices. The axes of core k are always (left, out,
in, right).

Decomposed cores are left-canonical in the Schmidt gauge of every bond: core k = U_{k-1}ᵀ U_k, where U_k are the left
singular vectors of the matrix cut at bond k. Slicing all bonds to χ is therefore a truncation by nested projectors, and
one decomposition serves every χ. Its squared error is at most the sum over bonds of the discarded squared singular
values (Oseledets 2011, theorem 2.2). `compression.numerics.truncated_svd` computes the SVD of a cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt

import torch
from torch.nn.functional import linear

from compression.numerics.legs import Legs
from compression.numerics.truncated_svd import Spectrum, truncated_svd
from compression.refusal import Refusal

__all__ = ["contract", "contract_with", "decompose", "truncate", "truncation_error_bound"]


def decompose(
    matrix: torch.Tensor, legs: Legs, max_chi: int | None = None
) -> tuple[list[torch.Tensor], list[Spectrum]]:
    """Compute the sequential SVD of `matrix` (out, in).

    Args:
        matrix: finite, floating point. Float64 is computed in float64, all other types in float32.
        legs: how both dimensions are split; the products of the legs must be the shape of `matrix`.
        max_chi: largest bond that is kept; None keeps every bond full, which is exact. A cap well below full is several
            times faster; each spectrum then has its leading values and the norm of the rest.

    Returns:
        The cores, each (left, out, in, right), and the spectrum of every inner bond before the truncation to `max_chi`.
        From the second bond on it is the spectrum of the matrix already truncated at earlier bonds.

    Raises:
        ValueError: the shape does not fit the legs, or an entry is not finite.
    """
    if tuple(matrix.shape) != (prod(legs.out_legs), prod(legs.in_legs)):
        raise Refusal(f"a matrix of shape {tuple(matrix.shape)} does not fit {legs}")
    count = len(legs.out_legs)
    order = [axis for core in range(count) for axis in (core, count + core)]
    rest = matrix.reshape(*legs.out_legs, *legs.in_legs).permute(*order).reshape(1, -1)
    cores: list[torch.Tensor] = []
    spectra: list[Spectrum] = []
    for core in range(count - 1):
        left = rest.shape[0]
        out_leg, in_leg = legs.out_legs[core], legs.in_legs[core]
        cut = truncated_svd(rest.reshape(left * out_leg * in_leg, -1), max_chi)
        cores.append(cut.left.reshape(left, out_leg, in_leg, -1))
        spectra.append(cut.spectrum)
        rest = cut.right
    cores.append(rest.reshape(rest.shape[0], legs.out_legs[-1], legs.in_legs[-1], 1))
    return cores, spectra


def truncate(cores: Sequence[torch.Tensor], chi: int | Sequence[int]) -> list[torch.Tensor]:
    """Returns the cores with every inner bond sliced to at most `chi`, one value for all bonds or one per bond.

    The results are views, not copies. Raises ValueError if a χ is below 1 or there is not one per bond.
    """
    inner = [chi] * (len(cores) - 1) if isinstance(chi, int) else list(chi)
    if len(inner) != len(cores) - 1 or min(inner, default=1) < 1:
        raise Refusal(f"chi must be at least 1, one for all bonds or one for each, got {chi}")
    ends = [None, *inner, None]
    return [core[:left, :, :, :right] for core, left, right in zip(cores, ends[:-1], ends[1:], strict=True)]


def truncation_error_bound(spectra: Sequence[Spectrum], chi: int) -> float:
    """Returns an upper bound of ‖W − Ŵ‖_F at bond dimension χ, in the norm used for the cores; exact for two cores."""
    return sqrt(sum(spectrum.discarded(chi) for spectrum in spectra))


def contract(cores: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the dense matrix (out, in) of an MPO."""
    result = cores[0].squeeze(0)  # (out, in, right)
    for core in cores[1:]:
        result = torch.einsum("oia,apjb->opijb", result, core)
        result = result.reshape(result.shape[0] * result.shape[1], result.shape[2] * result.shape[3], result.shape[4])
    return result.squeeze(-1)


def contract_with(cores: Sequence[torch.Tensor], activations: torch.Tensor, last_first: bool) -> torch.Tensor:
    """Computes Ŵ x for activations of shape (tokens, in) without forming Ŵ; returns (tokens, out).

    Args:
        last_first: whether to start at the last core instead of the first one. The result is the same, the cost differs
            (see `Legs.multiply_adds_from`).
    """
    tokens, inputs = activations.shape
    outputs = prod([core.shape[1] for core in cores])
    if last_first:
        state = activations.reshape(tokens, inputs, 1, 1, 1)  # (tokens, inputs left, outputs done, bond, newest output)
        for core in reversed(cores):
            left, out_leg, in_leg, right = core.shape
            inputs, done, newest = inputs // in_leg, state.shape[2], state.shape[4]
            rows = state.reshape(tokens, inputs, in_leg, done, right, newest).permute(0, 1, 5, 3, 2, 4)
            state = linear(rows.reshape(-1, in_leg * right), core.reshape(left * out_leg, in_leg * right))
            state = state.reshape(tokens, inputs, newest * done, left, out_leg)
        return state.permute(0, 1, 4, 2, 3).reshape(tokens, outputs)
    state = activations.reshape(tokens, 1, inputs, 1, 1)  # (tokens, outputs done, inputs left, newest output, bond)
    for core in cores:
        left, out_leg, in_leg, right = core.shape
        inputs, done, newest = inputs // in_leg, state.shape[1], state.shape[3]
        rows = state.reshape(tokens, done, in_leg, inputs, newest, left).permute(0, 1, 4, 3, 5, 2)
        weight = core.permute(1, 3, 0, 2).reshape(out_leg * right, left * in_leg)
        state = linear(rows.reshape(-1, left * in_leg), weight)
        state = state.reshape(tokens, done * newest, inputs, out_leg, right)
    return state.reshape(tokens, outputs)

"""MPO numerics on arrays: sequential SVD, truncation, contraction, error.

Tensors in, tensors out; knows no module, file or device. The axes of core k are always (left, out, in, right).

Cores come out left-canonical in the Schmidt gauge of every bond: core k = U_{k-1}ᵀ U_k, U_k the left singular vectors
of the matrix cut at bond k. Slicing all bonds to χ is then a truncation by nested projectors, so one decomposition
serves every χ, with squared error at most the sum over bonds of the discarded squared singular values (Oseledets 2011,
theorem 2.2). How the SVD of a cut is computed is the business of `compression.numerics.truncated_svd`.
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
    """Sequential SVD of `matrix` (out, in).

    Args:
        matrix: finite, floating point; float64 and float32 are computed in their own precision, less in float32.
        legs: the splitting; its products are the shape of `matrix`.
        max_chi: no bond is kept larger than this; None keeps every bond full, which is exact. A cap well below full
            is several times faster and then gives the leading part of each spectrum and what lies beyond it.

    Returns:
        The cores, each (left, out, in, right), and the spectrum of every inner bond before the cut at `max_chi` (from
        the second bond on it is the spectrum of the matrix already truncated at earlier bonds).

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
    """The cores with every inner bond sliced to at most `chi`, one for all or one per bond. Views, not copies."""
    inner = [chi] * (len(cores) - 1) if isinstance(chi, int) else list(chi)
    if len(inner) != len(cores) - 1 or min(inner, default=1) < 1:
        raise Refusal(f"chi must be at least 1, one for all bonds or one for each, got {chi}")
    ends = [None, *inner, None]
    return [core[:left, :, :, :right] for core, left, right in zip(cores, ends[:-1], ends[1:], strict=True)]


def truncation_error_bound(spectra: Sequence[Spectrum], chi: int) -> float:
    """Upper bound of ‖W − Ŵ‖_F at bond dimension χ, in the norm the cores were computed in (equality for two cores)."""
    return sqrt(sum(spectrum.discarded(chi) for spectrum in spectra))


def contract(cores: Sequence[torch.Tensor]) -> torch.Tensor:
    """The dense matrix (out, in) of an MPO."""
    result = cores[0].squeeze(0)  # (out, in, right)
    for core in cores[1:]:
        result = torch.einsum("oia,apjb->opijb", result, core)
        result = result.reshape(result.shape[0] * result.shape[1], result.shape[2] * result.shape[3], result.shape[4])
    return result.squeeze(-1)


def contract_with(cores: Sequence[torch.Tensor], activations: torch.Tensor, last_first: bool) -> torch.Tensor:
    """Ŵ x for activations of shape (tokens, in) without forming Ŵ; returns (tokens, out).

    Args:
        last_first: contract from the last core back instead of from the first one on; equal result, other cost (see
            `Legs.multiply_adds_from`).
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

"""Computes how large a model is under a schedule, in parameters, bytes and multiply-adds.

Works on integers from shapes; reads no tensor values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from compression.numerics.legs import resolve
from compression.schedule import Choice, Schedule
from compression.sites import Site, model_bytes, model_parameters

__all__ = ["Size", "SizeModel", "choice_multiply_adds", "choice_parameters"]


@dataclass(frozen=True)
class Size:
    """Holds the size of a model under a schedule.

    Attributes:
        kept_fraction: parameters after / before over the sites, in (0, 1].
        model_kept_fraction: parameters after / before over the whole model, tied weights counted once.
        bytes_fraction: bytes after / before over the whole model.
        parameters: parameters of the whole model, tied weights counted once.
        bytes: bytes of those parameters at the model's stored precision, plus the row indices of pivoted cores.
        multiply_adds: multiply-adds per token summed over the sites, each computed in the cheapest way.
    """

    kept_fraction: float
    model_kept_fraction: float
    bytes_fraction: float
    parameters: int
    bytes: int
    multiply_adds: int


class SizeModel:
    """Computes the sizes of one model's schedules."""

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self._sites = tuple(sites)
        self._model_parameters = model_parameters(model)
        self._model_bytes = model_bytes(model)
        self._element_size = {
            site.name: model.get_parameter(f"{site.name}.weight").element_size()
            for site in sites
            if not site.dense_because
        }

    def size(self, schedule: Schedule) -> Size:
        """Returns the size of the model under `schedule`, which must name every site."""
        before_sites = sum(site.parameters for site in self._sites)
        saved_at = {site.name: site.parameters - choice_parameters(site, schedule[site.name]) for site in self._sites}
        saved = sum(saved_at.values())
        saved_bytes = sum(saved_at[name] * size for name, size in self._element_size.items())
        saved_bytes -= sum(_INDEX_BYTES * _index_entries(site, schedule[site.name]) for site in self._sites)
        return Size(
            kept_fraction=(before_sites - saved) / before_sites,
            model_kept_fraction=(self._model_parameters - saved) / self._model_parameters,
            bytes_fraction=(self._model_bytes - saved_bytes) / self._model_bytes,
            parameters=self._model_parameters - saved,
            bytes=self._model_bytes - saved_bytes,
            multiply_adds=sum(choice_multiply_adds(site, schedule[site.name]) for site in self._sites),
        )


_INDEX_BYTES = 4


def _index_entries(site: Site, choice: Choice) -> int:
    if choice.is_dense:
        return 0
    return resolve(choice.topology, site.out_features, site.in_features).index_entries(choice.chi)


def choice_parameters(site: Site, choice: Choice) -> int:
    """Returns the number of parameters of one site under a choice."""
    if choice.is_dense:
        return site.parameters
    return resolve(choice.topology, site.out_features, site.in_features).parameters(choice.chi)


def choice_multiply_adds(site: Site, choice: Choice) -> int:
    """Returns the multiply-adds per token of one site: those of the contraction or of the dense product, whichever is
    less. The dense product requires rebuilding the matrix once per batch, which is not counted."""
    if choice.is_dense:
        return site.parameters
    return min(site.parameters, resolve(choice.topology, site.out_features, site.in_features).multiply_adds(choice.chi))

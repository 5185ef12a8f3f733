"""Computes how large a model is under a schedule, in parameters, bytes and multiply-adds.

Works on integers from shapes; reads no tensor values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from torch import nn

from compression.numerics.legs import resolve
from compression.schedule import Choice, Joint, Schedule
from compression.sites import Site, Unit, model_bytes, model_parameters

__all__ = ["Size", "SizeModel", "choice_multiply_adds", "choice_parameters"]


@dataclass(frozen=True)
class Size:
    """Holds the size of a model under a schedule.

    Attributes:
        kept_fraction: entries of matrices after / before over the sites, in (0, 1].
        model_kept_fraction: parameters after / before over the whole model, tied weights counted once.
        bytes_fraction: bytes after / before over the whole model.
        parameters: parameters of the whole model, tied weights counted once.
        bytes: bytes of those parameters at the model's stored precision, plus the row indices of pivoted cores and
            the numbers of the rows and columns that are left of cut matrices.
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
        self._biased = {name for name in self._element_size if model.get_submodule(name).bias is not None}

    def size(self, schedule: Schedule) -> Size:
        """Returns the size of the model under `schedule`, which must name every site."""
        before_sites = sum(site.parameters for site in self._sites)
        saved_at = {site.name: site.parameters - choice_parameters(site, schedule[site.name]) for site in self._sites}
        saved = sum(saved_at.values())
        biases = {site.name: site.out_features - site.shape(schedule[site.name].widths)[0] for site in self._sites}
        biases = {name: biases[name] for name in self._biased}
        saved_bytes = sum((saved_at[name] + biases.get(name, 0)) * size for name, size in self._element_size.items())
        saved_bytes -= sum(_INDEX_BYTES * _index_entries(site, schedule[site.name]) for site in self._sites)
        parameters = self._model_parameters - saved - sum(biases.values())
        return Size(
            kept_fraction=(before_sites - saved) / before_sites,
            model_kept_fraction=parameters / self._model_parameters,
            bytes_fraction=(self._model_bytes - saved_bytes) / self._model_bytes,
            parameters=parameters,
            bytes=self._model_bytes - saved_bytes,
            multiply_adds=sum(choice_multiply_adds(site, schedule[site.name]) for site in self._sites),
        )


_INDEX_BYTES = 4


def _index_entries(site: Site, choice: Choice) -> int:
    rows, columns = site.shape(choice.widths)
    kept = rows * (rows < site.out_features) + columns * (columns < site.in_features)
    return kept if choice.is_plain else kept + resolve(choice.topology, rows, columns).index_entries(choice.chi)


def choice_parameters(site: Site | Unit, choice: Choice | Joint) -> int:
    """Returns the number of parameters of one site or unit under a choice."""
    if isinstance(site, Unit):
        assert isinstance(choice, Joint)
        return sum(choice_parameters(*pair) for pair in zip(site.sites, choice.choices, strict=True))
    assert isinstance(choice, Choice)
    if choice.is_plain:
        return prod(site.shape(choice.widths))
    return _stored(choice.topology, *site.shape(choice.widths), choice.chi)


def choice_multiply_adds(site: Site | Unit, choice: Choice | Joint) -> int:
    """Returns the multiply-adds per token of one site or unit: those of the contraction or of the dense product,
    whichever is less. The dense product requires rebuilding the matrix once per batch, which is not counted."""
    if isinstance(site, Unit):
        assert isinstance(choice, Joint)
        return sum(choice_multiply_adds(*pair) for pair in zip(site.sites, choice.choices, strict=True))
    assert isinstance(choice, Choice)
    shape = site.shape(choice.widths)
    if choice.is_plain:
        return prod(shape)
    return min(prod(shape), _contracted(choice.topology, *shape, choice.chi))


@lru_cache(maxsize=1 << 18)  # the blocks of a model have the same shapes, and a menu has thousands of options
def _stored(topology: str, rows: int, columns: int, chi: int) -> int:
    return resolve(topology, rows, columns).parameters(chi)


@lru_cache(maxsize=1 << 18)
def _contracted(topology: str, rows: int, columns: int, chi: int) -> int:
    return resolve(topology, rows, columns).multiply_adds(chi)

"""Computes how large a model is under a schedule, in parameters, bytes and multiply-adds.

Works on integers from shapes; reads no tensor values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from torch import nn

from compression.numerics.bitmask import bitmask_bytes
from compression.numerics.legs import resolve
from compression.numerics.packed_size import GROUP, SCALE, packed_bytes
from compression.schedule import DENSE, Choice, Joint, Schedule
from compression.sites import Site, Unit, model_bytes, model_parameters

__all__ = ["Price", "Size", "SizeModel", "choice_multiply_adds", "choice_parameters"]

Price = Callable[[Site | Unit, Choice | Joint], int]
"""What a choice takes of a budget: its parameters (`choice_parameters`) or its bytes (`SizeModel.choice_bytes`)."""


@dataclass(frozen=True)
class Size:
    """Holds the size of a model under a schedule.

    Attributes:
        kept_fraction: entries of matrices after / before over the sites, in (0, 1].
        model_kept_fraction: parameters after / before over the whole model, tied weights counted once.
        bytes_fraction: bytes after / before over the whole model.
        parameters: parameters of the whole model, tied weights counted once.
        bytes: bytes of those parameters as they are stored, plus the row indices of pivoted cores, the numbers of the
            rows and columns that are left of cut matrices, the masks of pruned ones and the scales of rounded ones.
        multiply_adds: multiply-adds per token summed over the sites, each computed in the cheapest way.
    """

    kept_fraction: float
    model_kept_fraction: float
    bytes_fraction: float
    parameters: int
    bytes: int
    multiply_adds: int


class SizeModel:
    """Computes the sizes of one model's schedules.

    Args:
        model: the dense model; it may be on the meta device.
        sites: its sites.
        itemsize: bytes of a stored number; None for those that the parameters take in memory.
        group, scale: neighbours of a rounded matrix that share a scale, and the bytes of it.
        rounded: bytes that every schedule but the dense one saves outside the sites, by rounding embedding and head.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        itemsize: int | None = None,
        rounded: int = 0,
        group: int = GROUP,
        scale: int = SCALE,
    ) -> None:
        self._sites = tuple(sites)
        self._group, self._scale = group, scale
        self._rounded = rounded
        self._model_parameters = model_parameters(model)
        self._model_bytes = model_bytes(model, itemsize)
        self._itemsize = itemsize or next(model.parameters()).element_size()
        free = [site.name for site in sites if not site.dense_because]
        self._element_size = {name: itemsize or model.get_parameter(f"{name}.weight").element_size() for name in free}
        self._biased = {name for name in free if model.get_submodule(name).bias is not None}

    def size(self, schedule: Schedule) -> Size:
        """Returns the size of the model under `schedule`, which must name every site."""
        before = sum(site.parameters for site in self._sites)
        saved = sum(site.parameters - choice_parameters(site, schedule[site.name]) for site in self._sites)
        biases = sum(self._biases(site, DENSE) - self._biases(site, schedule[site.name]) for site in self._sites)
        parameters, stored = self._model_parameters - saved - biases, self.bytes(schedule)
        return Size(
            kept_fraction=(before - saved) / before,
            model_kept_fraction=parameters / self._model_parameters,
            bytes_fraction=stored / self._model_bytes,
            parameters=parameters,
            bytes=stored,
            multiply_adds=sum(choice_multiply_adds(site, schedule[site.name]) for site in self._sites),
        )

    def bytes(self, schedule: Schedule) -> int:
        """Returns the bytes of the model under `schedule`."""
        if all(choice.is_dense for _, choice in schedule):
            return self._model_bytes
        return self.fixed_bytes + sum(self.choice_bytes(site, schedule[site.name]) for site in self._sites)

    @property
    def fixed_bytes(self) -> int:
        """Bytes of all but the sites under every schedule but the dense one."""
        return self._model_bytes - self._rounded - sum(self.choice_bytes(site, DENSE) for site in self._sites)

    def choice_bytes(self, site: Site | Unit, choice: Choice | Joint) -> int:
        """Returns the bytes of one site or unit under a choice, with its bias."""
        if isinstance(site, Unit):
            assert isinstance(choice, Joint)
            return sum(self.choice_bytes(*pair) for pair in zip(site.sites, choice.choices, strict=True))
        assert isinstance(choice, Choice)
        size = self._element_size.get(site.name, self._itemsize)
        numbers = choice_parameters(site, choice) + self._biases(site, choice)
        mask = bitmask_bytes(site.out_features, site.in_features) if choice.is_sparse else 0
        if choice.bits:
            shape = (1, choice.chi) if choice.is_sparse else (site.out_features, site.in_features)
            packed = packed_bytes(*shape, choice.bits, self._group, self._scale)
            return packed + size * self._biases(site, choice) + mask
        return size * numbers + _INDEX_BYTES * _index_entries(site, choice) + mask

    def _biases(self, site: Site, choice: Choice) -> int:
        return site.shape(choice.widths)[0] if site.name in self._biased else 0


_INDEX_BYTES = 4


def _index_entries(site: Site, choice: Choice) -> int:
    rows, columns = site.shape(choice.widths)
    kept = rows * (rows < site.out_features) + columns * (columns < site.in_features)
    if not choice.is_factored:
        return kept
    return kept + resolve(choice.topology, rows, columns).index_entries(choice.chi)


def choice_parameters(site: Site | Unit, choice: Choice | Joint) -> int:
    """Returns the number of parameters of one site or unit under a choice; the mask of a pruned matrix has none."""
    if isinstance(site, Unit):
        assert isinstance(choice, Joint)
        return sum(choice_parameters(*pair) for pair in zip(site.sites, choice.choices, strict=True))
    assert isinstance(choice, Choice)
    if choice.is_sparse:
        return choice.chi
    if not choice.is_factored:
        return prod(site.shape(choice.widths))
    return _stored(choice.topology, *site.shape(choice.widths), choice.chi)


def choice_multiply_adds(site: Site | Unit, choice: Choice | Joint) -> int:
    """Returns the multiply-adds per token of one site or unit: those of the contraction or of the dense product,
    whichever is less. The dense product requires rebuilding the matrix once per batch, which is not counted, and so is
    filling in a pruned one."""
    if isinstance(site, Unit):
        assert isinstance(choice, Joint)
        return sum(choice_multiply_adds(*pair) for pair in zip(site.sites, choice.choices, strict=True))
    assert isinstance(choice, Choice)
    shape = site.shape(choice.widths)
    if not choice.is_factored:
        return prod(shape)
    return min(prod(shape), _contracted(choice.topology, *shape, choice.chi))


@lru_cache(maxsize=1 << 18)  # the blocks of a model have the same shapes, and a menu has thousands of options
def _stored(topology: str, rows: int, columns: int, chi: int) -> int:
    return resolve(topology, rows, columns).parameters(chi)


@lru_cache(maxsize=1 << 18)
def _contracted(topology: str, rows: int, columns: int, chi: int) -> int:
    return resolve(topology, rows, columns).multiply_adds(chi)

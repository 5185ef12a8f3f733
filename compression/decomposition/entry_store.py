"""Stores the entries of the matrices of one model in fewer bytes: some of them, in fewer bits, or both.

Combines pruning and rounding of a matrix with weights, metrics and the cache. Does not know the model they come from.
At equal bytes, rounding costs less than pruning: a matrix in 8 bits costs a thousandth of one that keeps half of its
entries in 16 (results/byte_forms.md). Below the 2.25 bits that it takes at least, pruned matrices of 3 bits go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from compression.allocation.menu import Option
from compression.bonds import linear_layer
from compression.decomposition.measured import Matrix, Measured
from compression.layers.packed import PackedLinear, PackedMatrix
from compression.layers.sparse_linear import SparseLinear
from compression.numerics.bitmask import pack
from compression.numerics.group_integers import Codes, Metric, dequantize, quantize
from compression.numerics.large_moments import brief_product
from compression.numerics.packed_size import FLOATING, GROUP
from compression.numerics.pruning import Pruned, prune, refit_pruned
from compression.refusal import Refusal
from compression.schedule import SPARSE, Choice
from compression.sites import Site
from compression.storage.factor_cache import Bundle
from compression.storage.limited import LimitedBundles

__all__ = ["Entries", "EntryForms", "EntryStore", "entry_bytes", "ladder"]

_FORMAT = 2
"""Part of the cache keys of what is made here; increase it when results change."""
_SHARES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Bytes of a pruned matrix of 16 bits a number, its mask included, relative to those of the dense one."""
_MASK = 1 / 16  # bytes of the mask, relative to those of the dense matrix
_FEWEST = 3
"""Fewest bits of the entries of a pruned matrix: with 2, keeping fewer entries of 3 costs less."""
_SPARSE = 0.45
"""Largest density of a pruned matrix whose entries are rounded; above, one of fewer bits costs less."""
_HALFWAY = 0.7
"""Density that pruning passes on its way to the first of them."""


def ladder(site: Site, bits: int = FLOATING) -> list[int]:
    """Returns the numbers of entries that a site is pruned to, descending, each at least 1 and fewer than all."""
    most = site.parameters - 1 if bits == FLOATING else int(_SPARSE * site.parameters)
    return [count for count in _steps(site) if count <= most]


def _steps(site: Site) -> list[int]:
    """The numbers of entries that pruning passes on its way."""
    counts = {int((share - _MASK) * site.parameters) for share in _SHARES}
    return sorted((count for count in counts if 1 <= count < site.parameters), reverse=True)


def _passed(site: Site, bits: int) -> list[int]:
    """The numbers of entries that pruning passes on its way down the ladder of so many bits."""
    kept = ladder(site, bits)
    return kept if bits == FLOATING else [int(_HALFWAY * site.parameters), *kept]


def entry_bytes(site: Site, itemsize: int, bits: Sequence[int] = (FLOATING,)) -> int:
    """Returns the bytes of what is stored of a site: its values in every form, and one for each of its entries."""
    width = _pruned_bits(bits)
    size = 8 * itemsize if width == FLOATING else width
    return (size * sum(ladder(site, width)) + sum(each for each in bits if each != FLOATING) * site.parameters) // 8 + (
        site.parameters
    )


def _pruned_bits(bits: Sequence[int]) -> int:
    """The bits of the entries of pruned matrices among those offered."""
    return min((each for each in bits if each >= _FEWEST), default=_FEWEST)


@dataclass(frozen=True)
class EntryForms:
    """What menus by bytes offer of whole matrices.

    Attributes:
        bits: bits per number, see `compression.numerics.packed_size`.
        prunes: whether matrices are also pruned.
        group: neighbours that share a scale.
        whole_groups: whether only matrices are rounded whose rows are whole groups.
        fused: whether all matrices that write the same bond have the same bits, and those without a bond are not
            rounded.
    """

    bits: tuple[int, ...] = (FLOATING,)
    prunes: bool = True
    group: int = GROUP
    whole_groups: bool = False
    fused: bool = False

    def leaves_out(self, site: Site) -> bool:
        """Whether a site is not rounded because its rows are no whole groups, or nothing says what it is fused with."""
        return (self.whole_groups and site.in_features % self.group != 0) or (self.fused and not site.cuts)


@dataclass(frozen=True, eq=False)
class Entries:
    """Holds what is stored of a matrix.

    Attributes:
        matrix: float32 (out, in), 0 where an entry was removed.
        mask: which entries are left, bool (out, in); None for all.
        codes: the stored integers if the entries are rounded, of one row if some are removed; otherwise None.
        bits: bits of the integers; 0 without.
        group: neighbours that share a scale.
    """

    matrix: torch.Tensor
    mask: torch.Tensor | None = None
    codes: Codes | None = None
    bits: int = 0
    group: int = GROUP

    @classmethod
    def rounded(
        cls, matrix: torch.Tensor, bits: int, group: int, metric: Metric, mask: torch.Tensor | None = None
    ) -> Entries:
        """Returns a matrix in so many bits, rounded in a metric; 0 outside a mask."""
        return cls.packed(quantize(matrix, bits, group, metric, mask), bits, group, tuple(matrix.shape), mask)

    @classmethod
    def packed(
        cls, codes: Codes, bits: int, group: int, shape: tuple[int, ...], mask: torch.Tensor | None = None
    ) -> Entries:
        """Returns what packed integers of a matrix (out, in) stand for."""
        columns = shape[1] if mask is None else int(mask.sum())
        values = dequantize(codes.codes, codes.scales.float(), columns, bits, group)
        return cls(values if mask is None else scattered(values[0], mask), mask, codes, bits, group)

    def refitted(self, weight: torch.Tensor, inputs: torch.Tensor, gradients: torch.Tensor) -> Entries:
        """Returns the entries of another matrix (out, in) in the same form, in the metric of C and G."""
        if self.mask is not None:
            weight = refit_pruned(weight, inputs, gradients, Pruned(self.matrix, self.mask, 0.0)).matrix
        if not self.bits:
            return Entries(weight.float(), self.mask)
        return Entries.rounded(weight, self.bits, self.group, Metric(inputs, gradients), self.mask)

    def layer(self, dtype: torch.dtype, bias: torch.Tensor | None, stored: bool) -> nn.Module:
        """Returns a layer of the matrix, which holds what is stored of it or, for speed, all of it with zeros."""
        if not stored or (self.mask is None and self.codes is None):
            return linear_layer(self.matrix.to(dtype), bias)
        if self.codes is None:
            assert self.mask is not None
            return SparseLinear.of(self.matrix.to(dtype), self.mask, bias)
        columns = self.matrix.shape[1] if self.mask is None else int(self.mask.sum())
        packed = PackedMatrix(self.codes, columns, self.bits, self.group, dtype)
        if self.mask is None:
            return PackedLinear(packed, bias)
        return SparseLinear(packed, pack(self.mask), self.matrix.shape[1], bias)


def scattered(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns values (kept,) at the entries of a mask, and 0 elsewhere; several times as fast as masked_scatter."""
    at = mask.flatten().cumsum(0, dtype=torch.int32) * mask.flatten()  # entry n is value n, and 0 is no value
    return torch.cat([values.new_zeros(1), values]).index_select(0, at).view(mask.shape)


class EntryStore:
    """Prunes and rounds the sites of one model on demand.

    Args:
        sites: the sites of the model.
        measured: their weights and metrics.
        limited: stores the results.
        stored: type of the stored values of pruned matrices that are not rounded.
        forms: what is offered.

    Attributes:
        forms: as given.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        measured: Measured,
        limited: LimitedBundles,
        stored: torch.dtype,
        forms: EntryForms,
    ) -> None:
        self.forms = forms
        self._site = {site.name: site for site in sites}
        self._measured = measured
        self._limited = limited
        self._stored = stored
        self._identities: dict[tuple[str, int, bool], str] = {}
        self._last: tuple[str, Metric] | None = None

    def options(self, name: str) -> list[Option]:
        """Returns the forms of a site that are offered, each with its predicted cost in nats per token.

        Raises:
            ValueError: the site must stay dense.
        """
        self._refuse_dense(name)
        found, site = [], self._site[name]
        for bits in (each for each in self.forms.bits if each != FLOATING and not self.forms.leaves_out(site)):
            cost = float(self._bundle(name, bits, False).tensors["cost"])
            found.append(Option(Choice("dense", 0, "two-sided", bits=bits), cost))
        bits = _pruned_bits(self.forms.bits)
        if kept := ladder(self._site[name], bits) if self.forms.prunes else []:
            costs = self._bundle(name, bits, True).tensors["cost"].tolist()
            stored = 0 if bits == FLOATING else bits
            found += [
                Option(Choice(SPARSE, count, "two-sided", bits=stored), cost)
                for count, cost in zip(kept, costs, strict=True)
            ]
        return found

    def entries(self, name: str, choice: Choice) -> Entries:
        """Returns what is stored of a site under a choice, on the device of its weight.

        Raises:
            ValueError: the site must stay dense, or is not pruned to this number of entries.
        """
        self._refuse_dense(name)
        site, device = self._site[name], self._measured.weights[name].device
        bits = choice.bits or FLOATING
        if not choice.is_sparse:
            found = {key: values.to(device) for key, values in self._bundle(name, bits, False).tensors.items()}
            codes, shape = Codes(found["codes"], found["scales"]), (site.out_features, site.in_features)
            return Entries.packed(codes, bits, self.forms.group, shape)
        kept = ladder(site, bits)
        if choice.chi not in kept:
            nearest = min(kept, key=lambda count: abs(count - choice.chi), default="none")
            in_bits = "" if bits == FLOATING else f" of {bits} bits"
            raise Refusal(f"{name} is not pruned to {choice.chi} entries{in_bits}; the nearest number is {nearest}")
        number, tensors = kept.index(choice.chi), self._bundle(name, bits, True).tensors
        mask = tensors["steps"].to(device) > number
        if bits == FLOATING:
            return Entries(scattered(tensors[f"values.{number}"].to(device).float(), mask), mask)
        codes = Codes(*(tensors[f"{part}.{number}"].to(device) for part in ("codes", "scales")))
        return Entries.packed(codes, bits, self.forms.group, tuple(mask.shape), mask)

    def _refuse_dense(self, name: str) -> None:
        if reason := self._site[name].dense_because:
            raise Refusal(f"site {name} must stay dense: {reason}")

    def _metric(self, name: str, matrix: Matrix) -> Metric:
        """The metric of a site; the last one is kept, since all forms of a site are made one after the other."""
        if self._last is None or self._last[0] != name:
            self._last = name, Metric(matrix.inputs, matrix.gradients)
        return self._last[1]

    def _bundle(self, name: str, bits: int, pruned: bool) -> Bundle:
        """The stored results of a site in so many bits, with their costs: all of its entries, or those of every number.

        Of pruned matrices, `steps` says in how many of them every entry is, uint8 (out, in).
        """
        key = name, bits, pruned
        if key not in self._identities:
            parts: dict[str, object] = {"kind": "entries", "format": _FORMAT, "bits": bits}
            parts |= {"stored": str(self._stored)} if bits == FLOATING else {"group": self.forms.group}
            if pruned:
                parts["kept"] = ladder(self._site[name], bits)
            self._identities[key] = self._measured.key_of(name, **parts)
        build = self._pruned if pruned else self._rounded
        return self._limited.get_or_build(self._identities[key], lambda: build(name, bits))

    def _rounded(self, name: str, bits: int) -> Bundle:
        matrix = self._measured.matrix(name)
        made = Entries.rounded(matrix.weight, bits, self.forms.group, self._metric(name, matrix))
        assert made.codes is not None
        cost = torch.tensor(_cost(made.matrix - matrix.weight, matrix.inputs, matrix.gradients), dtype=torch.float64)
        return Bundle({"codes": made.codes.codes.cpu(), "scales": made.codes.scales.cpu(), "cost": cost})

    def _pruned(self, name: str, bits: int) -> Bundle:
        matrix, kept = self._measured.matrix(name), ladder(self._site[name], bits)
        steps = torch.zeros(matrix.weight.shape, dtype=torch.uint8, device=matrix.weight.device)
        costs: list[float] = []
        tensors: dict[str, torch.Tensor] = {}
        numbers = _passed(self._site[name], bits)
        for count, result in zip(numbers, prune(matrix.weight, matrix.inputs, matrix.gradients, numbers), strict=True):
            if count not in kept:
                continue
            number = len(costs)
            steps += result.mask
            if bits == FLOATING:
                costs.append(result.cost)
                tensors[f"values.{number}"] = result.matrix[result.mask].to(self._stored).cpu()
                continue
            made = Entries.rounded(result.matrix, bits, self.forms.group, self._metric(name, matrix), result.mask)
            assert made.codes is not None
            costs.append(_cost(made.matrix - matrix.weight, matrix.inputs, matrix.gradients))
            tensors |= {f"codes.{number}": made.codes.codes.cpu(), f"scales.{number}": made.codes.scales.cpu()}
        return Bundle({"steps": steps.cpu(), "cost": torch.tensor(costs, dtype=torch.float64), **tensors})


def _cost(error: torch.Tensor, inputs: torch.Tensor, gradients: torch.Tensor) -> float:
    """½·tr(G E C Eᵀ) in nats per token."""
    pulled = brief_product(inputs, brief_product(gradients, error).mT).mT
    return 0.5 * float((pulled * error).sum())

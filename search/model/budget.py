"""Turns the target of a configuration into a budget of parameters or bytes over the sites of a model.

Knows configurations, sites and sizes; does not know menus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from torch import nn

from compression.decomposition.entry_store import EntryForms
from compression.numerics.legs import resolve
from compression.numerics.packed_size import BITS, FLOATING
from compression.refusal import Refusal
from compression.schedule import DENSE, Choice, Schedule
from compression.sites import Site, model_parameters
from compression.size import Price, SizeModel, choice_parameters
from search.config import BYTES, Config, bytes_of
from search.model.ends import rounding_saves

__all__ = ["Budget", "smallest"]

_SCARCE = 3.5
"""Bits for every entry of the matrices, masks and scales counted, below which some may be pruned. A pruned matrix is
worth having below the 2.25 bits that a rounded one takes at least (results/byte_forms.md), and matrices that matter
little have a bit less than the mean."""


@dataclass(frozen=True, eq=False)
class Budget:
    """What a run counts, and how much of it its schedules may keep.

    Attributes:
        sizes: sizes of the model's schedules, as the files of the run hold them.
        price: what a choice takes: parameters, or bytes.
        target_kept: the most that a schedule may take of what all sites take when they are dense, in (0, 1].
        least_kept: what the smallest schedule takes of that.
        wanted: the target in the words of the user, such as "size 100MB".
        least: the least target that can be met, in the same words.
        embedding_bits: bits a number of the embedding and the output head in the files of the run; 16 stands for all
            that it keeps as it is.
        forms: what menus offer of whole matrices; None if they offer no entries in fewer bytes. Matrices are pruned if
            nothing is rounded, or if so few bits are left for an entry that keeping fewer of them may cost less.
    """

    sizes: SizeModel
    price: Price
    target_kept: float
    least_kept: float
    wanted: str
    least: str
    embedding_bits: int
    forms: EntryForms | None

    @classmethod
    def of(cls, config: Config, model: nn.Module, sites: Sequence[Site]) -> Budget:
        """Returns the budget of a configuration for a dense model, which may be on the meta device.

        Raises:
            ValueError: the size is not smaller than that of the dense model, or its embedding cannot be rounded.
        """
        bits = _embedding_bits(config, model)
        scales = config.scale_group, config.engine.scale_bytes
        rounded = rounding_saves(model, bits, *scales) if bits < 8 * BYTES else 0
        if config.embedding_bits == bits < 8 * BYTES and not rounded:
            raise Refusal(
                f"embedding_bits must be {8 * BYTES} for {config.model}, whose embedding does more than look up rows, "
                f"got {bits}"
            )

        def made(kept: float, least_kept: float, wanted: str, least: str) -> Budget:
            scarce = config.offered_bits == (FLOATING,) or FLOATING * kept < _SCARCE
            whole = not config.has_factors
            how = config.scale_group, whole, config.engine.fused
            forms = EntryForms(config.offered_bits, scarce and not whole, *how)
            return cls(sizes, price, kept, least_kept, wanted, least, bits, forms if config.offered_bits else None)

        sizes = SizeModel(model, sites, BYTES if config.by_bytes else None, rounded, *scales)
        price: Price = sizes.choice_bytes if config.by_bytes else choice_parameters
        dense = sum(price(site, DENSE) for site in sites)
        least = sum(price(site, smallest(site, config)) for site in sites)
        fixed, whole = sizes.fixed_bytes, sizes.bytes(Schedule.dense(tuple(site.name for site in sites)))
        ends = f"its embedding in {bits} bits and all else in {8 * BYTES}" if rounded else f"{8 * BYTES} bits a number"
        if config.size is not None:
            if (room := bytes_of(config.size) - fixed) >= dense:
                most = _size(fixed + dense)
                raise Refusal(f"size must be below {most}, what {config.model} takes with {ends}, got {config.size}")
            words = f"size {config.size}", _size(fixed + least)
            return made(room / dense, least / dense, *words)
        if (share := config.target_bytes_kept) is not None:
            if (room := int(share * whole) - fixed) >= dense:
                most = f"{_up((fixed + dense) / whole):.4f}"
                raise Refusal(
                    f"target_bytes_kept must be below {most}, what {config.model} takes with {ends}, got {share}"
                )
            words = f"target_bytes_kept {share}", f"{_up((fixed + least) / whole):.4f}"
            return made(room / dense, least / dense, *words)
        words = f"target_kept {config.target_kept}", f"{least / dense:.4f}"
        return made(config.target_kept, least / dense, *words)


def _embedding_bits(config: Config, model: nn.Module) -> int:
    """Bits a number of the embedding: as the user says, or at about the same cost per byte as the matrices."""
    if not config.rounds_embedding:
        return FLOATING
    if config.embedding_bits is not None:
        return config.embedding_bits
    if config.offered_bits == (FLOATING,):
        return BITS[0]
    if config.size is not None:
        average = 8 * bytes_of(config.size) / model_parameters(model)
    else:
        average = FLOATING * (config.target_bytes_kept or config.target_kept)
    return config.engine.end_bits(average)


def smallest(site: Site, config: Config) -> Choice:
    """Returns the smallest form of a site: its bonds have their least width, and what is left has χ = 1 if it may.

    Where there are no factors, a matrix without bonds has its fewest bits.
    """
    widths = () if config.form == "factors" else tuple(cut.least for cut in site.cuts)
    rows, columns = site.shape(widths)
    rounds = not (site.dense_because or config.has_factors or widths or site.in_features % config.scale_group)
    if rounds and (bits := min(config.offered_bits, default=FLOATING)) < FLOATING:
        return Choice("dense", 0, "two-sided", bits=bits)
    if site.dense_because or not config.has_factors or not rows or not columns:
        return Choice("dense", 0, "none", widths)
    if not resolve("pivoted-lowrank", rows, columns).break_even_chi:
        return Choice("dense", 0, "none", widths)
    return Choice("pivoted-lowrank", 1, "two-sided", widths)


def _size(number: int) -> str:
    """Bytes as a user gives them, rounded up."""
    return f"{ceil(number / 1e3)}kB" if number < 1e6 else f"{ceil(number / 1e4) / 100:.2f}MB"


def _up(fraction: float) -> float:
    return ceil(fraction * 1e4) / 1e4

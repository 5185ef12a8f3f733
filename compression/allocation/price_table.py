"""Tabulates how many parameters every site keeps, and at what predicted cost, over the price of a parameter.

Uses NumPy only; does not know models. A price λ (nats per parameter) determines the option of each site independently:
the one with the least cost + λ·parameters. The table over a grid of log prices predicts the outcome of thousands of
allocations without running one. These predictions serve as features and explanations only; schedules always come from
the exact `compression.allocation.closed_form.lagrangian`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from compression.allocation.menu import Menu

__all__ = ["Frontier", "Tradeoff"]

_SPAN = 5.0  # extent of the grid on both sides of the closed-form price, in log price
_CELLS = 500  # number of grid points
_HALVINGS = 12  # number of bisection steps; 10 / 2^12 is finer than a cell
_WINDOW = 12  # cells on both sides over which the tables are averaged to be smooth, 0.24 in log price
_FINE_HALVINGS = 30  # number of bisection steps for smooth tables


@dataclass(frozen=True)
class Tradeoff:
    """Describes smoothed allocations and how they answer to their log weights, with arrays of shape (n, sites).

    Raising the log weight of site j lowers the cost of that site by `rise[j]` and, because the price then rises for
    all sites, raises the cost of every site i by `share[j]·rise[i]`. The size stays the same.

    Attributes:
        cost: predicted KL of every site, nats per token.
        rise: derivative of that cost by the log price of the site, at least 0.
        share: fraction of the parameters freed by a small increase in price that site j frees; each row adds up to 1,
            or to 0 if no site frees any.
    """

    cost: NDArray[np.float64]
    rise: NDArray[np.float64]
    share: NDArray[np.float64]

    def gradient(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns the derivative of Σ weights·cost by every log weight, (sites,) -> (n, sites)."""
        marginal = weights * self.rise
        found: NDArray[np.float64] = self.share * marginal.sum(axis=1, keepdims=True) - marginal
        return found


@dataclass(frozen=True, eq=False)
class Frontier:
    """Holds tables of shape (sites, cells), with ascending prices.

    Attributes:
        target_parameters: target of the allocation.
        log_price: natural logarithm of the closed-form price λ*, the least price at which the whole menu meets the
            target, to 1e-9.
        grid: log prices of the cells, (cells,).
        parameters: parameters of the option that each site takes at a price.
        cost: predicted KL of that option, nats per token.
    """

    target_parameters: int
    log_price: float
    grid: NDArray[np.float64]
    parameters: NDArray[np.float64]
    cost: NDArray[np.float64]

    @classmethod
    def build(cls, menu: Menu, target_parameters: int) -> Frontier:
        """Returns the tables of `menu` around the price at which it keeps `target_parameters`."""
        most = max(len(site.choices) for site in menu.sites)
        parameters = np.zeros((len(menu.sites), most))
        cost = np.full((len(menu.sites), most), np.inf)
        for row, site in enumerate(menu.sites):
            parameters[row, : len(site.choices)] = site.parameters
            cost[row, : len(site.choices)] = site.cost
        rows = np.arange(len(menu.sites))

        def options(log_price: float) -> NDArray[np.int64]:
            taken: NDArray[np.int64] = np.argmin(cost + np.exp(log_price) * parameters, axis=1)
            return taken

        slopes = [-np.diff(site.cost) / np.diff(site.parameters) for site in menu.sites if len(site.choices) > 1]
        positive = np.concatenate([slope[slope > 0] for slope in slopes] or [np.ones(1)])
        low = high = 0.0
        if len(positive):
            low, high = float(np.log(positive.min())) - 1.0, float(np.log(positive.max())) + 1.0
        while high - low > 1e-9 * max(1.0, abs(high)):
            middle = (low + high) / 2
            if parameters[rows, options(middle)].sum() > target_parameters:
                low = middle
            else:
                high = middle
        grid = high + np.linspace(-_SPAN, _SPAN, _CELLS)
        taken = np.stack([options(float(price)) for price in grid], axis=1)
        return cls(
            target_parameters=target_parameters,
            log_price=high,
            grid=grid,
            parameters=np.take_along_axis(parameters, taken, axis=1),
            cost=np.take_along_axis(cost, taken, axis=1),
        )

    def kept(self, sites: NDArray[np.int64], offsets: NDArray[np.float64]) -> float:
        """Returns the parameters that `sites` keep in total at the closed-form price, with costs times exp(offsets)."""
        return float(self.parameters[sites, self._cell(self.log_price - offsets)].sum())

    def costs(self, log_weights: NDArray[np.float64], dense: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Returns the predicted KL of every site, (n, sites) in nats per token, at the price that meets the target.

        Args:
            log_weights: log weights of n allocations, (n, sites).
            dense: which sites stay dense, at cost 0, (n, sites).
        """
        sites = np.arange(log_weights.shape[1])
        full = self.parameters.max(axis=1)
        low, high = np.full(len(log_weights), self.grid[0]), np.full(len(log_weights), self.grid[-1])
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            taken = self.parameters[sites, self._cell(middle[:, None] - log_weights)]
            over = np.where(dense, full, taken).sum(axis=1) > self.target_parameters
            low, high = np.where(over, middle, low), np.where(over, high, middle)
        cost: NDArray[np.float64] = self.cost[sites, self._cell(high[:, None] - log_weights)]
        return np.where(dense, 0.0, cost)

    def tradeoff(self, log_weights: NDArray[np.float64]) -> Tradeoff:
        """Returns smoothed costs at the price that meets the target, and their derivatives, for (n, sites) log weights.

        The tables are averaged over neighbouring prices and interpolated linearly, so that the derivatives are those of
        the costs, exactly, almost everywhere.
        """
        parameters, cost = self._smooth
        low, high = np.full(len(log_weights), self.grid[0]), np.full(len(log_weights), self.grid[-1])
        for _ in range(_FINE_HALVINGS):
            middle = (low + high) / 2
            over = self._read(parameters, middle[:, None] - log_weights)[0].sum(axis=1) > self.target_parameters
            low, high = np.where(over, middle, low), np.where(over, high, middle)
        at = high[:, None] - log_weights
        (_, freed), (found, rise) = self._read(parameters, at), self._read(cost, at)
        total = freed.sum(axis=1, keepdims=True)
        return Tradeoff(found, rise, np.divide(freed, total, out=np.zeros_like(freed), where=total < 0))

    @cached_property
    def _smooth(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Tables of parameters and cost, averaged over the window around every cell."""
        width = 2 * _WINDOW + 1
        smoothed = []
        for table in (self.parameters, self.cost):
            padded = np.pad(table, ((0, 0), (_WINDOW + 1, _WINDOW)), mode="edge").cumsum(axis=1)
            smoothed.append((padded[:, width:] - padded[:, :-width]) / width)
        return smoothed[0], smoothed[1]

    def _read(
        self, table: NDArray[np.float64], log_price: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Interpolated entries of a table and their derivatives by the log price, (n, sites) each."""
        width = self.grid[1] - self.grid[0]
        place = (log_price - self.grid[0]) / width
        inside = (place >= 0) & (place < _CELLS - 1)
        cell = np.clip(place, 0, _CELLS - 2).astype(np.int64)
        sites = np.arange(len(table))
        left, step = table[sites, cell], table[sites, cell + 1] - table[sites, cell]
        value = left + np.clip(place - cell, 0.0, 1.0) * step
        return value, np.where(inside, step / width, 0.0)

    def _cell(self, log_price: NDArray[np.float64]) -> NDArray[np.int64]:
        width = self.grid[1] - self.grid[0]
        cell: NDArray[np.int64] = np.clip(np.rint((log_price - self.grid[0]) / width), 0, _CELLS - 1).astype(np.int64)
        return cell

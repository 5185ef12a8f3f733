"""Stores an unfinished repair in the cache after every block, so that another process can continue after the last one.

Knows modules, hidden states and the cache; does not know how a repair computes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from compression.layers.rebuild import rebuilt
from compression.schedule import Schedule
from compression.sites import Site
from compression.storage.factor_cache import Bundle, FactorCache, cache_key

__all__ = ["Repaired", "UnfinishedRepair"]


@dataclass(frozen=True, eq=False)
class Repaired:
    """What a repair has come to after some blocks.

    Attributes:
        blocks: number of blocks that are repaired.
        modules: their new modules by site name.
        states, dense_states: hidden states after the last of them, by batch, of the repaired and of the dense model.
    """

    blocks: int
    modules: Mapping[str, nn.Module]
    states: Sequence[torch.Tensor]
    dense_states: Sequence[torch.Tensor]


@dataclass(frozen=True)
class UnfinishedRepair:
    """Stores the modules of every repaired block, and the hidden states after the last one.

    Args:
        cache: the cache; without a folder, nothing is stored.
        key: identifies everything that determines the result of the repair.
    """

    cache: FactorCache
    key: str

    @property
    def blocks(self) -> int:
        """Number of blocks of which the cache has the result."""
        return int(self.cache.metadata(self._states).get("blocks", 0))

    def store(
        self,
        blocks: int,
        modules: Mapping[str, nn.Module],
        states: Sequence[torch.Tensor],
        dense_states: Sequence[torch.Tensor],
    ) -> None:
        """Store the result of a block.

        Args:
            blocks: number of blocks that are repaired, with this one.
            modules: the new modules of this block alone, by site name.
            states, dense_states: as in `Repaired`.

        Raises:
            OSError: the disk is full or not writable.
        """
        weights = {
            f"{name}/{key}": values.detach().contiguous().clone()
            for name, module in modules.items()
            for key, values in module.state_dict().items()
        }
        hidden = {
            f"{kind}/{batch}": values
            for kind, each in (("repaired", states), ("dense", dense_states))
            for batch, values in enumerate(each)
        }
        self.cache.replace(self._block(blocks), Bundle(weights))
        self.cache.replace(self._states, Bundle(hidden, {"blocks": str(blocks)}))

    def load(
        self, model: nn.Module, sites: Sequence[Site], schedule: Schedule, device: torch.device
    ) -> Repaired | None:
        """Returns what was stored last; None if there is nothing.

        If a part of it is missing or damaged, the rest is dropped. The tensors are copies in memory: the alignment of
        mapped ones could change the last bits of what is computed.

        Args:
            model: the dense model, on whose devices the modules are put.
            sites: the sites of the model.
            device: device of the hidden states.

        Raises:
            ValueError: a tensor does not fit the schedule.
        """
        if (kept := self.cache.load(self._states)) is None:
            return None
        blocks = int(kept.metadata["blocks"])
        weights: dict[str, dict[str, torch.Tensor]] = {}
        for number in range(1, 1 + blocks):
            if (bundle := self.cache.load(self._block(number))) is None:
                self.drop()
                return None
            for path, values in bundle.tensors.items():
                name, _, key = path.rpartition("/")
                weights.setdefault(name, {})[key] = values.clone()
        modules = {}
        for site in sites:
            if site.name in weights:
                place = next(model.get_submodule(site.name).parameters()).device
                modules[site.name] = rebuilt(site, schedule[site.name], weights[site.name]).to(place)
        states, dense_states = (
            [kept.tensors[f"{kind}/{batch}"].clone().to(device) for batch in range(len(kept.tensors) // 2)]
            for kind in ("repaired", "dense")
        )
        return Repaired(blocks, modules, states, dense_states)

    def drop(self) -> None:
        """Remove everything that is stored."""
        for number in range(1, 1 + self.blocks):
            self.cache.drop(self._block(number))
        self.cache.drop(self._states)

    @property
    def _states(self) -> str:
        return cache_key(kind="states of a repair", format=1, of=self.key)

    def _block(self, number: int) -> str:
        return cache_key(kind="block of a repair", format=1, of=self.key, block=number)

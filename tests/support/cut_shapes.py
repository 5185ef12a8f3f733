"""Tiny models whose blocks have widths that are alike, differ, or are 0."""

from __future__ import annotations

from dataclasses import replace

import torch
from cut_model import Cut, cut_model
from merging_tokenizer import merging_tokenizer

from compression.schedule import DENSE, Choice, Schedule
from compression.sites import Unit, units

# (hidden units, key/value groups) of each of the three blocks; None leaves a bond whole
ALIKE, DIFFER = ((24, None),) * 3, ((24, None), (16, None), (40, None))
FEWER_HEADS, ONE_HEAD_LESS = ((24, 1),) * 3, ((24, None), (None, 1), (40, None))
NO_MLP, NO_MLP_AT_THE_END = ((0, None), (24, 1), (None, None)), ((None, None), (24, None), (0, None))
NO_ATTENTION, NOTHING, NEITHER = ((None, None), (24, 0), (None, 1)), ((0, 0),) * 3, ((None, 0), (0, 0), (0, None))
SHAPES = [ALIKE, DIFFER, FEWER_HEADS, ONE_HEAD_LESS, NO_MLP, NO_MLP_AT_THE_END, NO_ATTENTION, NOTHING, NEITHER]


def cut_to(name, shape, untied=False):
    """A loaded tiny model of three blocks, cut to a shape, with a tokenizer that has a merge."""
    cut = cut_model(name)
    wanted = dict(enumerate(shape))
    chosen = {}
    for unit in units(cut.store.sites):
        assert isinstance(unit, Unit)
        width = wanted[unit.block][0 if unit.family == "mlp" else 1]
        if width is not None:
            chosen |= {site.name: Choice("dense", 0, "none", (width,)) for site in unit.sites}
    schedule = Schedule(tuple((site.name, chosen.get(site.name, DENSE)) for site in cut.store.sites))
    cut = Cut(replace(cut.loaded, tokenizer=merging_tokenizer()), cut.store, schedule)
    cut.apply()
    if untied:
        untie_(cut.loaded.model)
    return cut.loaded


@torch.no_grad()
def untie_(model):
    model.config.tie_word_embeddings = False
    head = model.lm_head
    head.weight = torch.nn.Parameter(head.weight.flip(0).contiguous(), requires_grad=False)


@torch.no_grad()
def with_biases_(model):
    """Give every matrix of the blocks a bias, in place."""
    generator = torch.Generator().manual_seed(3)
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            bias = torch.randn(module.out_features, generator=generator) * 0.3
            module.bias = torch.nn.Parameter(bias, requires_grad=False)

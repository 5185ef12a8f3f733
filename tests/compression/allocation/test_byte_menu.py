"""Menus by bytes."""

import numpy as np
import torch

from compression.allocation.byte_menu import Noise, byte_menu, choice_bytes
from compression.layers.packed import PackedMPO
from compression.layers.planner import random_layer
from compression.layers.quantize import packed
from compression.numerics.legs import resolve
from compression.schedule import DENSE, Choice
from compression.sites import Site

SITE = Site("blocks.0.q", 0, "q", 48, 32)
SPECTRUM = np.linspace(1, 0.05, 32)
NOISE = {8: Noise(1e-4, 1e-5), 4: Noise(0.05, 0.005)}


def test_bytes_are_those_of_the_modules_made():
    for bits in (8, 4):
        legs = resolve("pivoted-lowrank", 48, 32)
        layer = random_layer(legs, 7, torch.float32, torch.device("cpu"))
        twin = packed(layer, bits, 16, None)
        assert isinstance(twin, PackedMPO)
        stored = sum(values.numel() * values.element_size() for values in twin.state_dict().values())
        assert stored == choice_bytes(SITE, Choice("pivoted-lowrank", 7, "two-sided"), bits, 16)
    assert choice_bytes(SITE, DENSE, 16, 16) == 2 * 48 * 32


def test_options_ascend_in_bytes_descend_in_cost_and_end_dense():
    made = byte_menu(SITE, SPECTRUM, NOISE, 16)
    assert (np.diff(made.menu.parameters) > 0).all()
    assert (np.diff(made.menu.cost) < 0).all()
    assert made.menu.choices[-1].is_dense
    assert made.bits[-1] == 16
    assert {8, 4} < set(made.bits)


def test_without_noise_only_dense_in_the_fewest_bits_is_left_of_the_dense_ones():
    made = byte_menu(SITE, SPECTRUM, {4: Noise(0.0, 0.0)}, 16, tensorized=False)
    assert made.bits == (4, 16)


def test_bits_that_cost_too_much_never_stand_for_a_good_option():
    made = byte_menu(SITE, SPECTRUM, {4: Noise(1e9, 1e9)}, 16)
    assert made.menu.cost[-2] < 1
    assert not any(bits == 4 and cost < 1 for bits, cost in zip(made.bits, made.menu.cost, strict=True))

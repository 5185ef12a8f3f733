"""Menus of bonds that are whole or gone, for engines with one number of heads for all blocks."""

from cut_model import cut_model

from compression.allocation.menu import whole
from compression.sites import Unit, units


def test_a_menu_of_whole_bonds_has_all_heads_or_none():
    store = cut_model("random:tiny-llama").store
    for unit in units(store.sites):
        assert isinstance(unit, Unit)
        options = store.bonds.menu(unit, "pivoted-lowrank", "two-sided", True, 1)
        left = {choice.choices[0].widths for choice in whole(options).choices}
        assert left == {(0,), ()}
        assert any(any(choice.choices[0].widths) for choice in options.choices)

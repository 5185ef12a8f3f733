"""Which sites belong together, above all: which parts of which matrices make one attention head."""

import numpy as np
import pytest

from compression import discover_sites, split_heads_
from compression.allocation.menu import Menu, SiteMenu
from compression.schedule import DENSE, Choice
from envs.groups import group_sites
from search.model.architecture import head_size
from search.model.loading import load_model


def menu_of(sites):
    """Two options a site, or dense alone where it has to be."""
    menus = []
    for site in sites:
        choices = (DENSE,) if site.dense_because else (Choice("lowrank", 1, "two-sided"), DENSE)
        parameters = np.array([1, site.parameters][-len(choices) :], dtype=np.int64)
        menus.append(SiteMenu(site, choices, parameters, np.array([1.0, 0.0][-len(choices) :]), parameters))
    return Menu(tuple(menus))


def in_heads(name):
    loaded = load_model(name, "cpu")
    split_heads_(loaded.model, discover_sites(loaded.model), head_size(loaded.model))
    return discover_sites(loaded.model)


def members(sites):
    """Paths inside the first block, by group."""
    groups = group_sites(menu_of(sites), "head")
    return {
        group.name: {sites[index].name.split(".0.", 1)[1] for index in group.sites}
        for group in groups
        if group.name.startswith("block_00")
    }


@pytest.mark.parametrize("name", ["random:tiny-llama", "random:tiny-qwen2"])
def test_keys_and_values_go_with_all_queries_that_read_them(name):
    # Four heads, and two of keys and values.
    found = members(in_heads(name))
    for shared in (0, 1):
        parts = {f"self_attn.{matrix}_proj.{shared}" for matrix in "kv"}
        parts |= {f"self_attn.{matrix}_proj.{2 * shared + i}" for matrix in "qo" for i in (0, 1)}
        assert found.pop(f"block_00_head_{shared:02d}") == parts
    assert found == {"block_00_other": {f"mlp.{matrix}_proj" for matrix in ("gate", "up", "down")}}


def test_queries_keys_and_values_in_one_matrix_are_told_apart():
    found = members(in_heads("random:tiny-gpt2"))
    for head in range(4):
        parts = {f"attn.c_attn.{head + offset}" for offset in (0, 4, 8)} | {f"attn.c_proj.{head}"}
        assert found.pop(f"block_00_head_{head:02d}") == parts
    assert found == {"block_00_other": {"mlp.c_fc", "mlp.c_proj"}}


@pytest.mark.parametrize("name", ["random:tiny-llama", "random:tiny-gpt2"])
def test_every_site_with_a_choice_belongs_to_one_group(name):
    sites = in_heads(name)
    grouped = [index for group in group_sites(menu_of(sites), "head") for index in group.sites]
    assert sorted(grouped) == [index for index, site in enumerate(sites) if not site.dense_because]


def test_heads_that_were_not_cut_are_refused():
    sites = discover_sites(load_model("random:tiny-llama", "cpu").model)
    with pytest.raises(ValueError, match="granularity head needs attention matrices split into heads"):
        group_sites(menu_of(sites), "head")

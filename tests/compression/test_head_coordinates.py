"""The coordinates of heads are found by tests on the model, whatever its class is called."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compression.bonds import discover_bonds
from compression.head_coordinates import Coordinates, head_coordinates
from compression.numerics.attention_bonds import rotary_pairs
from compression.sites import discover_sites
from search.model.loading import load_model

HEADS, GROUPS, SIZE = 4, 2, 8


class Attention(nn.Module):
    """Grouped queries with one of several kinds of positions, or a normalisation of the queries and keys."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.head_dim = kind, SIZE
        self.q, self.k, self.v = (nn.Linear(16, heads * SIZE) for heads in (HEADS, GROUPS, GROUPS))
        self.o = nn.Linear(HEADS * SIZE, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (each(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for each in (self.q, self.k, self.v))
        if self.kind == "normed":
            q, k = (nn.functional.rms_norm(each, (SIZE,)) for each in (q, k))
        if self.kind in ("half", "interleaved"):
            q, k = self.rotated(q), self.rotated(k)
        if self.kind == "squashed":
            v = v.tanh()
        v, k = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (v, k))
        if self.kind == "no scores":
            k = 0 * k
        read = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(read.transpose(1, 2).flatten(2))

    def rotated(self, heads: torch.Tensor) -> torch.Tensor:
        first, second = rotary_pairs(SIZE, self.kind == "interleaved").unbind(1)
        angles = torch.arange(heads.shape[2])[:, None] / 10 ** torch.arange(SIZE // 2)
        result = torch.empty_like(heads)
        result[..., first] = heads[..., first] * angles.cos() - heads[..., second] * angles.sin()
        result[..., second] = heads[..., first] * angles.sin() + heads[..., second] * angles.cos()
        return result


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(nn.Sequential(Attention(kind)) for _ in range(2))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return x @ self.embedding.weight.T


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", Coordinates(True, "any")),
        ("half", Coordinates(True, "half")),
        ("interleaved", Coordinates(True, "interleaved")),
        ("normed", Coordinates(True, "")),
        ("no scores", Coordinates(True, "")),
        ("squashed", Coordinates(False, "any")),
    ],
)
def test_the_coordinates_are_those_that_leave_the_output_as_it_was(kind: str, expected: Coordinates) -> None:
    model = Model(kind).eval()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    bonds = [bond for bond in discover_bonds(model, discover_sites(model)) if bond.kind == "heads"]
    assert len(bonds) == 2
    assert {head_coordinates(model, bond) for bond in bonds} == {expected}
    for name, values in model.state_dict().items():
        assert torch.equal(values, before[name])


@pytest.mark.parametrize("name", ["random:tiny-llama", "random:tiny-qwen2"])
def test_rotary_models_are_recognised(name: str) -> None:
    model = load_model(name, "cpu").model
    bond = next(each for each in discover_bonds(model, discover_sites(model)) if each.kind == "heads")
    assert head_coordinates(model, bond) == Coordinates(True, "half")


def test_a_bond_without_heads_is_refused() -> None:
    model = load_model("random:tiny-llama", "cpu").model
    bond = next(each for each in discover_bonds(model, discover_sites(model)) if each.kind == "hidden")
    with pytest.raises(ValueError, match="has no heads, its bond is of the kind 'hidden'"):
        head_coordinates(model, bond)

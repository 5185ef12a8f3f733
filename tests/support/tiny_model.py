"""Small models and layers that several tests build on."""

from __future__ import annotations

import torch
from tokenizers.processors import TemplateProcessing
from torch import nn

from compression.layers.heads import split_heads_
from compression.layers.mpo_linear import MPOLinear
from compression.numerics.cores import decompose, truncate
from compression.numerics.gauge import stored
from compression.numerics.legs import resolve
from compression.sites import dense_weight, discover_sites
from search.model.loading import LoadedModel, load_model


class Conv1D(nn.Module):
    """Transposed weight, as in GPT-2."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.2)
        self.bias = nn.Parameter(torch.randn(outputs) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def with_beginning(loaded: LoadedModel) -> LoadedModel:
    """The same model with a tokenizer that puts its beginning-of-sequence token before a text, as Gemma's does."""
    tokenizer = loaded.tokenizer
    token = tokenizer.bos_token
    template = TemplateProcessing(single=[token, "$A"], special_tokens=[(token, tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = template
    return loaded


def tensorized(name: str = "random:tiny-llama", chi: int = 8, heads: bool = False):
    """A tiny loaded model with an MPO of one of four topologies in most of its sites, and some left dense."""
    loaded = load_model(name, "cpu")
    if heads:
        split_heads_(loaded.model, discover_sites(loaded.model), 8)
    kinds = ("pivoted-lowrank", "pivoted-mpo2", "lowrank", "mpo3")
    for number, site in enumerate(discover_sites(loaded.model)):
        if site.dense_because or number % 5 == 4:
            continue
        dense = loaded.model.get_submodule(site.name)
        weight, topology = dense_weight(dense), kinds[number % 4]
        cores, _ = decompose(weight, resolve(topology.removeprefix("pivoted-"), *weight.shape))
        cut = truncate(cores, min(chi, min(weight.shape) - 1))
        layer = MPOLinear(stored(cut, topology.startswith("pivoted-")), dense.bias)
        loaded.model.set_submodule(site.name, layer)
    return loaded


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding: weights read from a file are mapped at any address, and products round by the address."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def assert_same_tensors(found: nn.Module, expected: nn.Module) -> None:
    """Equal names and, bit for bit, equal values of everything that is stored."""
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(values, theirs[name]) for name, values in ours.items())

"""Statistics of experts are those of the tokens that the router sends them, computed here from the fused layer."""

from __future__ import annotations

import pytest
import torch

from compression import collect, discover_sites
from compression.calibration import statistics
from compression.layers.experts import take_apart_
from compression.numerics.pooled_moments import MomentSum, pooled_moments
from search.model.loading import load_model

NAME, BLOCK = "random:tiny-qwen3-moe", "model.layers.1.mlp"


def smooth(logits: torch.Tensor, mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A gradient that does not jump where rounding changes a sampled token."""
    return logits.softmax(-1) * mask[..., None]


def text(length: int = 30) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids = torch.randint(0, 256, (4, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, length:] = False
    return [(ids, mask)]


def routed(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Inputs, output gradients, chosen experts and weights of the fused layer's tokens, without padding."""
    model, (ids, mask) = load_model(NAME, "cpu").model, batch
    caught: dict[str, torch.Tensor] = {}

    def keep(module: object, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        caught.update(zip(("inputs", "chosen", "weights"), (each.detach() for each in args), strict=True))
        output.register_hook(lambda gradient: caught.update(gradient=gradient))

    model.get_submodule(f"{BLOCK}.experts").register_forward_hook(keep)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    logits.backward(smooth(logits.detach(), mask, torch.Generator()))
    return tuple(caught[name][mask.flatten()] for name in ("inputs", "gradient", "chosen", "weights"))


def test_an_expert_has_the_moments_of_its_tokens_shrunk_towards_those_of_its_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "sampled_gradient", smooth)
    model = load_model(NAME, "cpu").model
    take_apart_(model)
    [batch] = text()
    found = collect(model, discover_sites(model), [batch], torch.Generator())
    inputs, gradient, chosen, weights = routed(batch)
    ins, outs, counts = {}, {}, {}
    for expert in range(4):
        rows, place = torch.where(chosen == expert)
        for table, values in ((ins, inputs[rows]), (outs, gradient[rows] * weights[rows, place, None])):
            table[str(expert)] = MomentSum(values.T @ values, float(values.square().sum(1).square().sum()), len(rows))
        counts[str(expert)] = len(rows)
    assert 0 < min(counts.values()) < max(counts.values()) < len(inputs)
    pooled_in, pooled_out = pooled_moments(ins, True), pooled_moments(outs, True)
    for expert, rows in counts.items():
        name = f"{BLOCK}.experts.{expert}"
        torch.testing.assert_close(found.input(f"{name}.gate_proj"), pooled_in[expert], rtol=1e-3, atol=1e-6)
        assert torch.equal(found.input(f"{name}.gate_proj"), found.input(f"{name}.up_proj"))
        assert found.input_of[f"{name}.up_proj"] == f"{name}.gate_proj"
        share = (rows + 0.5) / len(inputs)
        scale = float(pooled_out[expert].abs().max())
        torch.testing.assert_close(
            found.gradient(f"{name}.down_proj"), pooled_out[expert] * share, rtol=1e-3, atol=1e-4 * scale
        )


def test_an_expert_that_no_token_reaches_has_the_moments_of_its_layer_and_is_nearly_free() -> None:
    model = load_model(NAME, "cpu").model
    take_apart_(model)
    router = model.get_submodule(f"{BLOCK}.gate").weight
    with torch.no_grad():  # the scores of expert 2 are below those of 0 or of 1, whatever the token
        router[2] = torch.minimum(router[0], router[1]) * 0
        router[0], router[1] = router[3], -router[3]
    sites = discover_sites(model)
    found = collect(model, sites, text(), torch.Generator().manual_seed(0))
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        moment = found.gradient(f"{BLOCK}.experts.2.{leaf}")
        assert torch.isfinite(moment).all()
        others = [found.gradient(f"{BLOCK}.experts.{other}.{leaf}").trace() for other in (0, 1, 3)]
        assert 0 < moment.trace() < max(others)
    again = collect(model, sites, text(), torch.Generator().manual_seed(0), first=found)
    assert torch.isfinite(again.input(f"{BLOCK}.experts.2.down_proj")).all()

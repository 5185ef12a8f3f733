"""Collects second moments of the inputs and output gradients of every site over calibration text.

Let x be the input of a site and g the gradient, with respect to the site's output, of the log-likelihood of a token
sampled from the model itself. Then the Fisher information of the weight is the mean of (g xᵀ) ⊗ (g xᵀ), and an error E
of the weight costs a KL of about ½ of the mean of (gᵀ E x)². C and G are the Kronecker factors of the Fisher
information: ½·tr(G E C Eᵀ) predicts the cost.

If x and g were independent, C = mean of x xᵀ and G = mean of g gᵀ would suffice (Martens & Grosse 2015). They are not:
a token whose x is huge may hardly matter. Given such moments from a first pass, a second pass weights each token in C
by gᵀG⁻¹g and in G by xᵀC⁻¹x, each divided by its mean over the batch. Except for the scale this is one step of the
flip-flop iteration for a Kronecker covariance (Dutilleul 1999). Both passes must use the same text: on other text the
gradients have such heavy tails that a few tokens would outweigh all others.

An expert of a mixture reads only the n of N tokens that are routed to it. Its C is the mean over these n, its G the sum
over them divided by N, so that ½·tr(G E C Eᵀ) is the cost per token of the text. Both are shrunk towards those of all
experts of the layer (`compression.numerics.pooled_moments`), and n counts half a token more, so that an expert that the
text never reaches is not free. A row whose input or gradient is zero contributes nothing and does not count.

Knows torch modules and token batches; does not know tokenizers or files. Each batch takes one forward and one backward
pass, without weight gradients.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from compression.calibration.triangles import Triangles, mirror_upper_, triangle, whole
from compression.numerics.finite import is_finite
from compression.numerics.large_moments import brief_cholesky
from compression.numerics.pooled_moments import MomentSum, pooled_moments
from compression.numerics.products import products_of
from compression.numerics.whitening import shrink
from compression.refusal import Refusal
from compression.sites import Site, expert_of
from compression.storage.factor_cache import Bundle

__all__ = ["MomentAccumulator", "Statistics", "collect", "sampled_gradient"]

_SKETCH = 64  # number of random directions that estimate xᵀC⁻¹x, with a relative standard error of √(2/64)
_TRIANGLES = "upper triangles"
_SHRINKAGE = 0.003  # shrinkage of the first pass's moments before they weight the tokens
_HALF = 0.5  # tokens that an expert counts as reached by beside those that reach it (Jeffreys prior of a rate)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Holds the second moments of every site, float32, symmetric positive semidefinite.

    Attributes:
        inputs: C (in, in) by site name.
        input_of: by site name, the first site that reads the same input; q, k and v share their input.
        gradients: G (out, out) by site name.
        tokens: number of tokens that the moments average over.
    """

    inputs: Mapping[str, torch.Tensor]
    input_of: Mapping[str, str]
    gradients: Mapping[str, torch.Tensor]
    tokens: int

    def input(self, name: str) -> torch.Tensor:
        """Returns C (in, in) of a site. Raises ValueError if it was not collected or is not finite."""
        return _checked(name, "inputs", self.inputs.get(name))

    def gradient(self, name: str) -> torch.Tensor:
        """Returns G (out, out) of a site. Raises ValueError if it was not collected or is not finite."""
        return _checked(name, "gradients", self.gradients.get(name))

    def to_bundle(self) -> Bundle:
        """Returns the upper triangles of the moments as named tensors with metadata, for the cache."""
        return _bundle(self.inputs, self.input_of, self.gradients, self.tokens)

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Statistics:
        """Returns the statistics that `to_bundle` wrote; earlier versions wrote whole matrices."""
        inputs, input_of, gradients, tokens = _unbundled(bundle)
        if bundle.metadata.get("stored") == _TRIANGLES:
            return cls(Triangles(inputs), input_of, Triangles(gradients), tokens)
        return cls(inputs, input_of, gradients, tokens)


def _bundle(
    inputs: Mapping[str, torch.Tensor],
    input_of: Mapping[str, str],
    gradients: Mapping[str, torch.Tensor],
    tokens: int,
    **metadata: str,
) -> Bundle:
    tables = (("input", inputs), ("gradient", gradients))
    tensors = {f"{kind}/{name}": triangle(moment) for kind, table in tables for name, moment in table.items()}
    own = {"input_of": json.dumps(dict(input_of)), "tokens": str(tokens), "stored": _TRIANGLES}
    return Bundle(tensors, own | metadata)


def _unbundled(bundle: Bundle) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, torch.Tensor], int]:
    table: dict[str, dict[str, torch.Tensor]] = {"input": {}, "gradient": {}}
    for key, moment in bundle.tensors.items():
        kind, name = key.split("/", 1)
        table[kind][name] = moment
    input_of = json.loads(bundle.metadata["input_of"])
    return table["input"], input_of, table["gradient"], int(bundle.metadata["tokens"])


def collect(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    generator: torch.Generator,
    progress: Callable[[int], None] = lambda tokens: None,
    first: Statistics | None = None,
    mask_token: int | None = None,
    begun: Bundle | None = None,
    keep: Callable[[Callable[[], Bundle]], None] = lambda state: None,
) -> Statistics:
    """Collect C and G of every site that can be tensorized.

    A causal language model predicts at every token, a masked one at its mask tokens, and a classifier once for a text.
    G is scaled so that predicted costs are per prediction.

    Args:
        model: maps `input_ids` and `attention_mask` to an output with `logits` (batch, length, vocabulary), or (batch,
            classes) for a classifier; has `get_input_embeddings()`. Its parameters must not require gradients.
        sites: the sites of the model.
        batches: (input_ids, mask) pairs, each (batch, length), int64 and bool, on the model's device. Masked-out
            positions (right padding) are ignored.
        generator: draws the sampled tokens; on the model's device.
        progress: called with the number of tokens done after each batch.
        first: statistics of an earlier pass over the same batches, which weight the tokens; None weights all tokens
            equally.
        mask_token: the token at which a masked language model predicts; None for models of other kinds.
        begun: what an earlier call with the same arguments gave to `keep`; the batches that it counts are skipped, and
            the result is the same.
        keep: called after each batch with a function that returns the state so far.

    Raises:
        ValueError: there is no token; or the statistics of a site are not finite, the text never reaches the site, the
            prediction does not depend on it, or it does not read one row per token and is no expert that reads those
            routed to it. The message names the site.
    """
    accumulator = MomentAccumulator(model, sites, first)
    done = 0 if begun is None else accumulator.restore(begun, generator)
    with accumulator:
        for number, (input_ids, mask) in enumerate(batches, 1):
            if number <= done:
                continue
            accumulator.expect(mask)
            logits = model(input_ids=input_ids, attention_mask=mask.long(), use_cache=False).logits
            predicted = mask if mask_token is None else mask & (input_ids == mask_token)
            if logits.ndim == 2:
                predicted = mask.any(-1)
            gradient = sampled_gradient(logits.detach(), predicted, generator)
            if predicted is not mask:
                gradient *= math.sqrt(float(mask.sum()) / max(1.0, float(predicted.sum())))
            logits.backward(gradient)
            progress(accumulator.count())
            keep(partial(accumulator.state, number, generator))
    return accumulator.result()


def sampled_gradient(logits: torch.Tensor, mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns the gradient of Σ −log p(sampled token) with respect to the logits.

    It is the softmax minus the one-hot vector of the sampled token, and zero where masked out.

    Args:
        logits: (batch, length, vocabulary), or without the length.
        mask: which predictions count, bool, of the shape of `logits` without the last axis.
        generator: draws one token per position; on the device of `logits`.
    """
    gradient = torch.softmax(logits.float(), dim=-1)
    cumulative = gradient.cumsum(-1)
    uniform = torch.rand(logits.shape[:-1], generator=generator, device=logits.device)
    threshold = (uniform * cumulative[..., -1]).unsqueeze(-1)
    sampled = torch.searchsorted(cumulative, threshold).clamp_(max=logits.shape[-1] - 1)
    gradient.scatter_add_(-1, sampled, -torch.ones_like(threshold))
    return gradient.mul_(mask.unsqueeze(-1)).to(logits.dtype)


class MomentAccumulator:
    """Sums outer products at the sites of a model with hooks, while the model runs forward and backward.

    Use it as a context manager; call `expect` before every batch, `count` after it, and `result` at the end.

    Args:
        model: the model, or a part of it that finds its sites by name.
        sites: the sites; those that must stay dense are skipped.
        first: moments that weight the tokens, see the module; None weights all tokens equally.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], first: Statistics | None = None) -> None:
        self.model = model
        self.sites = [site for site in sites if not site.dense_because]
        self.tokens = 0
        self._mask = torch.empty(0)
        self._full = False  # whether the mask contains every position
        self._inputs: dict[str, MomentSum] = {}
        self._gradients: dict[str, MomentSum] = {}
        self._expert = {site.name: expert for site in self.sites if (expert := expert_of(site)) is not None}
        self._input_of: dict[str, str] = {}  # site -> site whose input it shares
        # By site, the sketches of C⁻¹ (in, 64) and G⁻¹ (out, 64).
        self._sketches: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if first is not None:
            for site in self.sites:
                device = next(model.get_submodule(site.name).parameters()).device
                inputs, gradients = first.input(site.name).to(device), first.gradient(site.name).to(device)
                self._sketches[site.name] = _sketch(inputs), _sketch(gradients)
        self._last: tuple[str, torch.Tensor] | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def expect(self, mask: torch.Tensor) -> None:
        """Set which positions of the next batch count, bool (batch, length)."""
        self._mask, self._full = mask, bool(mask.all())

    def count(self) -> int:
        """Count the tokens of a batch after its backward pass; returns the number of tokens so far."""
        self.tokens, self._last = self.tokens + int(self._mask.sum()), None
        return self.tokens

    @property
    def _tables(self) -> tuple[dict[str, MomentSum], dict[str, MomentSum]]:
        return self._inputs, self._gradients

    def state(self, batches: int, generator: torch.Generator) -> Bundle:
        """Returns the sums over the first `batches` batches, and the state of the generator after them."""
        drawn = generator.get_state().cpu().numpy().tobytes().hex()
        inputs, gradients = ({name: sums.outer for name, sums in each.items()} for each in self._tables)
        rows = json.dumps([{name: (sums.fourth, sums.rows) for name, sums in each.items()} for each in self._tables])
        found = inputs, self._input_of, gradients, self.tokens
        return _bundle(*found, batches=str(batches), generator=drawn, rows=rows)

    def restore(self, state: Bundle, generator: torch.Generator) -> int:
        """Continue from what `state` returned; returns the number of batches."""
        inputs, self._input_of, gradients, self.tokens = _unbundled(state)
        device = {site.name: next(self.model.get_submodule(site.name).parameters()).device for site in self.sites}
        for table, outer, rows in zip(
            self._tables, (inputs, gradients), json.loads(state.metadata["rows"]), strict=True
        ):
            for name, sums in outer.items():
                table[name] = MomentSum(whole(sums).to(device[name]), *rows[name])
        drawn = bytearray.fromhex(state.metadata["generator"])
        generator.set_state(torch.frombuffer(drawn, dtype=torch.uint8))
        return int(state.metadata["batches"])

    def __enter__(self) -> MomentAccumulator:
        embeddings = self.model.get_input_embeddings()  # type: ignore[operator]
        self._hooks.append(embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_()))
        for site in self.sites:
            module = self.model.get_submodule(site.name)
            self._hooks.append(module.register_forward_hook(self._forward_hook(site.name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._last = None

    def result(self) -> Statistics:
        if self.tokens == 0:
            raise Refusal("no calibration token: statistics need at least one")
        for table in (self._inputs, self._gradients):
            for found in table.values():
                mirror_upper_(found.outer)
        moments = self._routed()
        for site in self.sites:
            if site.name in moments:
                continue
            if site.name not in self._input_of:
                raise Refusal(f"site {site.name}: never reached by the calibration text; it cannot be calibrated")
            if site.name not in self._gradients:
                raise _not_differentiable(site.name)
            both = (table[site.name].outer.div_(self.tokens) for table in (self._inputs, self._gradients))
            moments[site.name] = tuple(both)
        inputs = {site.name: _checked(site.name, "inputs", moments[site.name][0]) for site in self.sites}
        gradients = {site.name: _checked(site.name, "gradients", moments[site.name][1]) for site in self.sites}
        return Statistics(inputs, self._input_of, gradients, self.tokens)

    def _routed(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """Returns C and G of the experts that read only some tokens, by site; completes `_input_of`."""
        moments: dict[str, tuple[torch.Tensor, ...]] = {}
        for inside in self._lists():
            reached = [name for name in self._input_of if name in inside and name in self._gradients]
            if not reached or all(self._inputs[name].rows == self.tokens for name in inside if name in reached):
                continue
            order = list(dict.fromkeys(name.rpartition(".")[2] for name in reached))  # as an expert runs them
            for leaf in order:
                alike = [name for name in inside if name.rpartition(".")[2] == leaf]
                first = next(name for name in reached if name.rpartition(".")[2] == leaf)
                for name in alike:
                    other = self._input_of[first].rpartition(".")[2]
                    self._input_of.setdefault(name, f"{name.removesuffix(leaf)}{other}")
                # Only the last matrix of an expert reads hidden values, and the others write them.
                inputs, gradients = (
                    pooled_moments({name: table.get(name, _nothing(table[first])) for name in alike}, aligned)
                    for table, aligned in ((self._inputs, leaf != order[-1]), (self._gradients, leaf == order[-1]))
                )
                for name in alike:
                    rows = self._gradients[name].rows if name in self._gradients else 0
                    moments[name] = inputs[name], gradients[name] * ((rows + _HALF) / self.tokens)
        return moments

    def _lists(self) -> list[list[str]]:
        """Returns the sites of each layer of experts."""
        lists: dict[str, list[str]] = {}
        for name, (experts, _) in self._expert.items():
            lists.setdefault(experts, []).append(name)
        return list(lists.values())

    def _forward_hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if not args or (args[0].shape[:-1].numel() != self._mask.numel() and name not in self._expert):
                read = f"shape {tuple(args[0].shape)}" if args else "a keyword argument"
                raise Refusal(f"site {name}: must read one row per token to be calibrated, reads {read}")
            if not output.requires_grad:
                raise _not_differentiable(name)
            shared = self._last is not None and self._last[1] is args[0]
            source = self._last[0] if self._last is not None and shared else name
            self._last = (source, args[0])
            if self._input_of.setdefault(name, source) != source:
                raise Refusal(f"site {name} does not read the same input in every pass; it cannot be calibrated")
            output.register_hook(partial(self._add, name, args[0].detach()))  # type: ignore[no-untyped-call]

        return hook

    def _add(self, name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        both = [values.reshape(-1, values.shape[-1]) for values in (inputs, gradients)]
        if name in self._expert:  # padding has no gradient
            mask = (both[0] != 0).any(1) & (both[1] != 0).any(1)
        else:
            mask = self._mask.flatten().to(inputs.device)  # a model may be spread over several devices
        rows = [(values if self._full and name not in self._expert else values[mask]).float() for values in both]
        weights = [torch.ones(len(values), device=values.device) for values in rows]
        if name in self._sketches:
            weights = [_weights(*pair) for pair in zip(rows, self._sketches[name], strict=True)]
        for table, values, weight in zip((self._inputs, self._gradients), rows, reversed(weights), strict=True):
            if name not in table:
                table[name] = MomentSum(torch.zeros(values.shape[1], values.shape[1], device=values.device), 0.0, 0)
            found = table[name]
            with products_of(inputs.dtype):
                _add_upper_gram_(found.outer, values, weight)
            found.fourth += float((values.square().sum(1) * weight).square().sum()) if name in self._expert else 0.0
            found.rows += len(values)


def _nothing(like: MomentSum) -> MomentSum:
    return MomentSum(torch.zeros_like(like.outer), 0.0, 0)


def _checked(name: str, kind: str, moment: torch.Tensor | None) -> torch.Tensor:
    """Returns the moment of a site; raises ValueError if it is missing or not finite."""
    if moment is None:
        raise Refusal(f"site {name}: no second moment of its {kind} was collected")
    if not is_finite(moment):
        raise Refusal(f"site {name}: the second moment of its {kind} has NaN or infinite entries")
    return moment


def _not_differentiable(name: str) -> Refusal:
    return Refusal(f"site {name}: no gradient of the prediction reaches it; it cannot be calibrated")


def _sketch(moment: torch.Tensor) -> torch.Tensor:
    """Returns random P (d, 64) with E‖Pᵀx‖² = xᵀM⁻¹x / d in expectation over P, for a moment M (d, d)."""
    size, generator = len(moment), torch.Generator(device=moment.device).manual_seed(0)
    factor = brief_cholesky(shrink(moment, _SHRINKAGE))
    directions = torch.randn(size, _SKETCH, generator=generator, device=moment.device, dtype=factor.dtype)
    solved = torch.linalg.solve_triangular(factor.mT, directions, upper=True)
    sketch: torch.Tensor = (solved / math.sqrt(size * _SKETCH)).float()
    return sketch


def _weights(rows: torch.Tensor, sketch: torch.Tensor) -> torch.Tensor:
    """Returns an estimate of xᵀM⁻¹x for every row x (n, d), divided by its mean over the rows."""
    result: torch.Tensor = (rows @ sketch).square().sum(1)
    weights: torch.Tensor = result / result.mean().clamp_min(torch.finfo(result.dtype).tiny)
    return weights


def _add_upper_gram_(total: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor) -> None:
    """Add the upper block triangle of Σ w·x xᵀ over `rows` (n, d) to `total` (d, d): 5/8 of the full product.

    Within `products_of` bfloat16, √w·x is rounded, at random and by 1/500 at most, far below the noise of sampled text.
    Both factors are rounded alike, so that the sum stays positive semidefinite: with w·x and x, rows in the thousands
    gave it negative eigenvalues of twice the shrinkage.
    """
    scaled = rows * weights.sqrt()[:, None]
    width = rows.shape[1]
    step = max(64, -(-width // 4))
    for start in range(0, width, step):
        stop = min(start + step, width)
        total[start:stop, start:].addmm_(scaled[:, start:stop].T, scaled[:, start:])

"""Statistics: second moments of what flows into and back out of every site, streamed over calibration text.

C = mean of x xᵀ over the inputs x of a site; G = mean of g gᵀ over the gradients g, with respect to the site's output,
of the log-likelihood of a token sampled from the model itself. C and G are the Kronecker factors of the Fisher
information of the site's weight (Martens & Grosse 2015), so ½·tr(G E C Eᵀ) predicts the KL that an error E costs.

Knows torch modules and token batches; no tokenizer, no file. One forward and one backward pass per batch, no weight
gradients.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from compression.cache import Bundle
from compression.sites import Site

__all__ = ["MomentAccumulator", "Statistics", "collect", "sampled_gradient"]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Second moments of every site, float32, symmetric positive semidefinite.

    Attributes:
        inputs: C (in, in) by the name of the first site that reads this input; q, k and v share one.
        input_of: which entry of `inputs` belongs to a site.
        gradients: G (out, out) by site name.
        tokens: number of tokens averaged over.
    """

    inputs: Mapping[str, torch.Tensor]
    input_of: Mapping[str, str]
    gradients: Mapping[str, torch.Tensor]
    tokens: int

    def input(self, name: str) -> torch.Tensor:
        """C (in, in) of a site. Raises ValueError if it was not collected or is not finite."""
        return _checked(name, "inputs", self.inputs.get(self.input_of.get(name, "")))

    def gradient(self, name: str) -> torch.Tensor:
        """G (out, out) of a site. Raises ValueError if it was not collected or is not finite."""
        return _checked(name, "gradients", self.gradients.get(name))

    def to_bundle(self) -> Bundle:
        """As named tensors with metadata, for the cache."""
        tensors = {f"input/{name}": moment for name, moment in self.inputs.items()}
        tensors |= {f"gradient/{name}": moment for name, moment in self.gradients.items()}
        return Bundle(tensors, {"input_of": json.dumps(dict(self.input_of)), "tokens": str(self.tokens)})

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Statistics:
        """Inverse of `to_bundle`."""
        table: dict[str, dict[str, torch.Tensor]] = {"input": {}, "gradient": {}}
        for key, moment in bundle.tensors.items():
            kind, name = key.split("/", 1)
            table[kind][name] = moment
        input_of = json.loads(bundle.metadata["input_of"])
        return cls(table["input"], input_of, table["gradient"], int(bundle.metadata["tokens"]))


def collect(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    generator: torch.Generator,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Statistics:
    """Stream C and G of every site that can be tensorized.

    Args:
        model: maps `input_ids` and `attention_mask` to an output with `logits` (batch, length, vocabulary); has
            `get_input_embeddings()`. Its parameters must not require gradients.
        batches: (input_ids, mask) pairs, each (batch, length), int64 and bool, on the model's device; masked-out
            positions (right padding) count nowhere.
        generator: draws the sampled tokens; on the model's device.
        progress: called with the number of tokens done after each batch.

    Raises:
        ValueError: no token at all; or, by name, a site whose statistics are not finite, that the text never reaches,
            that the prediction does not depend on, or that does not read one row a token.
    """
    accumulator = MomentAccumulator(model, sites)
    with accumulator:
        for input_ids, mask in batches:
            accumulator.mask, accumulator.full = mask, bool(mask.all())
            logits = model(input_ids=input_ids, attention_mask=mask.long(), use_cache=False).logits
            logits.backward(sampled_gradient(logits.detach(), mask, generator))
            accumulator.tokens += int(mask.sum())
            progress(accumulator.tokens)
    return accumulator.result()


def sampled_gradient(logits: torch.Tensor, mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gradient of Σ −log p(sampled token) with respect to the logits: softmax minus one-hot, zero where masked out."""
    gradient = torch.softmax(logits.float(), dim=-1)
    cumulative = gradient.cumsum(-1)
    uniform = torch.rand(logits.shape[:-1], generator=generator, device=logits.device)
    threshold = (uniform * cumulative[..., -1]).unsqueeze(-1)
    sampled = torch.searchsorted(cumulative, threshold).clamp_(max=logits.shape[-1] - 1)
    gradient.scatter_add_(-1, sampled, -torch.ones_like(threshold))
    return gradient.mul_(mask.unsqueeze(-1)).to(logits.dtype)


class MomentAccumulator:
    """Hooks on the sites of a model while it runs; sums of outer products."""

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self.model = model
        self.sites = [site for site in sites if not site.dense_because]
        self.tokens = 0
        self.mask = torch.empty(0)
        self.full = False  # whether the mask leaves nothing out
        self._inputs: dict[str, torch.Tensor] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        self._input_of: dict[str, str] = {}  # site -> site whose input it shares
        self._last: tuple[str, torch.Tensor] | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

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
            raise ValueError("no calibration token: statistics need at least one")
        for kind, table in (("inputs", self._inputs), ("gradients", self._gradients)):
            for name, moment in table.items():
                _mirror_upper_(moment.div_(self.tokens))
                _checked(name, kind, moment)
        for site in self.sites:
            if site.name not in self._input_of:
                raise ValueError(f"site {site.name}: never reached by the calibration text; it cannot be calibrated")
            if site.name not in self._gradients:
                raise _not_differentiable(site.name)
        return Statistics(self._inputs, self._input_of, self._gradients, self.tokens)

    def _forward_hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if not args or args[0].shape[:-1].numel() != self.mask.numel():
                read = f"shape {tuple(args[0].shape)}" if args else "a keyword argument"
                raise ValueError(f"site {name}: must read one row a token to be calibrated, reads {read}")
            if not output.requires_grad:
                raise _not_differentiable(name)
            if self._last is not None and self._last[1] is args[0]:
                source = self._last[0]
            else:
                source = name
                self._add(self._inputs, name, args[0].detach())
                self._last = (name, args[0])
            if self._input_of.setdefault(name, source) != source:
                raise ValueError(f"site {name} does not read the same input in every pass; it cannot be calibrated")
            output.register_hook(lambda gradient: self._add(self._gradients, name, gradient))  # type: ignore[no-untyped-call]

        return hook

    def _add(self, table: dict[str, torch.Tensor], name: str, values: torch.Tensor) -> None:
        rows = values.reshape(-1, values.shape[-1])
        rows = (rows if self.full else rows[self.mask.flatten()]).float()
        if name not in table:
            table[name] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        _add_upper_gram_(table[name], rows)


def _checked(name: str, kind: str, moment: torch.Tensor | None) -> torch.Tensor:
    """The moment of a site, if it is there and finite."""
    if moment is None:
        raise ValueError(f"site {name}: no second moment of its {kind} was collected")
    if not torch.isfinite(moment).all():
        raise ValueError(f"site {name}: the second moment of its {kind} has NaN or infinite entries")
    return moment


def _not_differentiable(name: str) -> ValueError:
    return ValueError(f"site {name}: no gradient of the prediction reaches it; it cannot be calibrated")


def _add_upper_gram_(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add the upper block triangle of Σ x xᵀ over `rows` (n, d) to `total` (d, d): 5/8 of the full product."""
    width = rows.shape[1]
    step = max(64, -(-width // 4))
    for start in range(0, width, step):
        stop = min(start + step, width)
        total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])


def _mirror_upper_(total: torch.Tensor) -> None:
    """Make a matrix whose upper triangle is filled symmetric."""
    upper = total.triu(1)
    total.triu_().add_(upper.T)

"""Order the rows of the healing text and compute their targets with the dense model.

Knows the dense model and rows of tokens; does not know the model that learns.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn

from compression.layers.packed import PackedLinear
from compression.refusal import Refusal
from compression.training.distillation import Distributions, Head, Targets, labels, likeliest
from compression.training.trainable import captured_head_input
from search.healing.rows import HealingText

__all__ = ["Teacher", "output_head"]

_KEPT = {"cpu": 2**30, "cuda": 2**34}
"""Limit in bytes of the targets stored in main memory, by device type: a GPU reaches the second epoch sooner."""
_SHARE = 8
"""The stored targets never use more than main memory divided by this number."""


class Teacher:
    """Gives the rows of the healing text in order, with their inputs and targets.

    Args:
        dense: the model that computes the targets.
        text: the rows to learn from.
        top_tokens: number of the dense model's likeliest tokens per position to use as targets; 0 uses the
            probabilities of all tokens, which are never stored; None uses the next tokens of the text itself.
        hidden: whether the last hidden states of the dense model are needed too.
        keep: whether to store the targets of rows for later epochs, as far as memory allows.
        seed: seed of the order of the rows.
    """

    def __init__(
        self, dense: nn.Module, text: HealingText, top_tokens: int | None, hidden: bool, keep: bool, seed: int
    ) -> None:
        self.dense, self.text, self.hidden, self.seed = dense, text, hidden, seed
        self.top_tokens = top_tokens
        self.head = output_head(dense)
        self.device = self.head.weight.device
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        row = text.tokens.shape[1] * (top_tokens or 0) * 6  # bytes
        self._room = _bytes(self.device) // row if row and keep and not hidden else 0

    def rows(self, position: int, count: int) -> list[int]:
        """`count` row numbers, starting at `position` in an endless sequence of epochs with a new order in each."""
        found: list[int] = []
        total = len(self.text)
        while len(found) < count:
            epoch, place = divmod(position + len(found), total)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            found += torch.randperm(total, generator=generator)[place : place + count - len(found)].tolist()
        return found

    def inputs(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (rows, length), and whether the token after each position is to be learned (rows, length)."""
        chosen = torch.tensor(rows)
        return self.text.tokens[chosen].long().to(self.device), self.text.wanted[chosen].to(self.device)

    def targets(self, rows: Sequence[int]) -> tuple[Targets | Distributions, torch.Tensor | None]:
        """Targets at the wanted positions of these rows, concatenated, and the dense hidden states there if needed."""
        ids, wanted = self.inputs(rows)
        if self.top_tokens is None:
            return labels(ids.roll(-1, 1)[wanted]), None
        if all(row in self._kept for row in rows):
            tokens, logs = (torch.cat(parts) for parts in zip(*(self._kept[row] for row in rows), strict=True))
            return Targets(tokens.long().to(self.device), logs.float().to(self.device)), None
        with torch.no_grad(), captured_head_input(self.dense) as caught:
            self.dense(input_ids=ids, use_cache=False)
        hidden = caught[0][wanted]
        if not self.top_tokens:
            return Distributions(hidden, self.head), hidden if self.hidden else None
        targets = likeliest(hidden, self.head, self.top_tokens)
        targets = Targets(targets.tokens, targets.logs.half().float())  # rounded as the stored ones are
        self._keep(rows, wanted.sum(1).tolist(), targets)
        return targets, hidden if self.hidden else None

    def _keep(self, rows: Sequence[int], counts: Sequence[int], targets: Targets) -> None:
        """Store the targets of these rows, row by row, as far as memory allows."""
        if len(self._kept) >= self._room:
            return
        parts = (values.cpu().split_with_sizes(counts) for values in (targets.tokens.int(), targets.logs.half()))
        for row, tokens, logs in zip(rows, *parts, strict=True):
            if len(self._kept) < self._room:
                self._kept.setdefault(row, (tokens, logs))


def _bytes(device: torch.device) -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(_KEPT.get(device.type, _KEPT["cpu"]), memory // _SHARE)


def output_head(model: nn.Module) -> Head:
    """The output head of a model, with the scale and cap of logits that its configuration states.

    Raises:
        ValueError: there is no head, it is not a linear layer, or the model changes its output in another way.
    """
    module = model.get_output_embeddings()  # type: ignore[operator]
    if module is None:
        raise Refusal(
            f"healing needs a model that predicts tokens, and this one is a {type(model).__name__}; use heal_minutes 0"
        )
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    fed: list[torch.Tensor] = []
    hook = module.register_forward_hook(lambda module, args, output: fed.extend((args[0], output)))
    try:
        with torch.no_grad():
            ids = torch.ones(1, 2, dtype=torch.long, device=next(model.parameters()).device)
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    if isinstance(module, nn.Linear | PackedLinear):
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        cap = getattr(config, "final_logit_softcapping", None)
        bias = module._parameters["bias"]
        head = Head(module.weight.detach(), None if bias is None else bias.detach(), scale, cap)
        plain = scale == 1 and cap is None
        if torch.equal(logits.nan_to_num(), fed[1].nan_to_num()) if plain else _alike(head.logits(fed[0]), logits):
            return head
    raise Refusal(
        "healing needs a model whose logits are a linear map of its last hidden states, or one capped by tanh"
    )


def _alike(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether logits agree as well as the precision of `wanted` allows."""
    return torch.allclose(found, wanted.float(), rtol=0, atol=1e-2 * float(wanted.abs().max()), equal_nan=True)

"""Lessons: in which order rows are learned from, and what the dense model says there, kept for later epochs.

Knows a causal language model and rows of tokens; nothing of the one that learns.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn

from compression.refusal import Refusal
from compression.training.distillation import Head, Targets, labels, likeliest
from compression.training.trainable import captured_head_input
from search.healing.rows import HealingText

__all__ = ["Teacher", "output_head"]

_KEPT = {"cpu": 2**30, "cuda": 2**34}
"""Most bytes of targets that are kept in main memory, by where models are: a GPU is sooner through with a text."""
_SHARE = 8
"""No more than this fraction of main memory."""


class Teacher:
    """Rows in their order, and what is to be learned of them.

    Args:
        dense: gives the targets.
        top_tokens: how many of its likeliest tokens are; None takes the text's own next tokens instead.
        hidden: whether its last hidden states are wanted too.
        keep: keep targets of rows for when they are met again, as far as there is room for them.
        seed: of the order.
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
        self._room = _bytes(self.device) // max(1, row) if keep and not hidden else 0

    def rows(self, position: int, count: int) -> list[int]:
        """The `count` rows from a position of the endless sequence of epochs on, each epoch in an order of its own."""
        found: list[int] = []
        total = len(self.text)
        while len(found) < count:
            epoch, place = divmod(position + len(found), total)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            found += torch.randperm(total, generator=generator)[place : place + count - len(found)].tolist()
        return found

    def inputs(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (rows, length) and what of them is to be learned."""
        chosen = torch.tensor(rows)
        return self.text.tokens[chosen].long().to(self.device), self.text.wanted[chosen].to(self.device)

    def targets(self, rows: Sequence[int]) -> tuple[Targets, torch.Tensor | None]:
        """Of all wanted positions of these rows one after the other, and the dense hidden states if they are needed."""
        ids, wanted = self.inputs(rows)
        if self.top_tokens is None:
            return labels(ids.roll(-1, 1)[wanted]), None
        if all(row in self._kept for row in rows):
            tokens, logs = (torch.cat(parts) for parts in zip(*(self._kept[row] for row in rows), strict=True))
            return Targets(tokens.long().to(self.device), logs.float().to(self.device)), None
        with torch.no_grad(), captured_head_input(self.dense) as caught:
            self.dense(input_ids=ids, use_cache=False)
        hidden = caught[0][wanted]
        targets = likeliest(hidden, self.head, self.top_tokens)
        targets = Targets(targets.tokens, targets.logs.half().float())  # the same whether met before or not
        self._keep(rows, wanted.sum(1).tolist(), targets)
        return targets, hidden if self.hidden else None

    def _keep(self, rows: Sequence[int], counts: Sequence[int], targets: Targets) -> None:
        """As far as there is room, row by row."""
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
    """The output head of a model.

    Raises:
        ValueError: logits are not what the head gives.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    fed: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda module, args, output: fed.append(output))
    try:
        with torch.no_grad():
            ids = torch.ones(1, 2, dtype=torch.long, device=head.weight.device)
            logits = model(input_ids=ids, use_cache=False).logits
            same = torch.equal(logits.nan_to_num(), fed[0].nan_to_num())
    finally:
        hook.remove()
    if not isinstance(head, nn.Linear) or not same:
        raise Refusal("healing needs a model whose logits are a linear map of its last hidden states")
    return Head(head.weight.detach(), None if head.bias is None else head.bias.detach())

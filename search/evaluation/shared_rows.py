"""Test on a model whether several texts may share a row of a forward pass, kept apart by a mask.

A mask reaches attention only. Convolutions and recurrent states run on from one text into the next, layers with a
sliding window take a given mask in place of their window, and some models take no mask of pairs at all. None of this
need raise an error, so one row is compared with plain passes of its texts. Knows a causal language model and tokens;
does not know data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from search.evaluation.logits import read
from search.evaluation.packed_sequences import Packed, apart, packed_text, row_inputs
from search.runtime.memory import is_out_of_memory

__all__ = ["APART", "keeps_rows_apart", "shares_rows"]

APART = (
    "in this model, texts that share a row would change each other in spite of the mask between them, so every text "
    "and every answer has a row of its own, and all passes take longer"
)
"""The sentence for the user about a model that `shares_rows` is false for."""

_PREFIX, _BRANCHES = 4, (3, 4)  # tokens of the item that is tested
_PLACES = 16  # positions of the text that are compared
_NOISE = 4.0  # largest difference in units of that of rounding
_LEAST = 1e-4  # smallest difference that counts, in standard deviations of the logits


@dataclass
class _Tested:
    """Lengths of text, in tokens, for which the test held, and from which on it failed."""

    held: int = 0
    failed: float = float("inf")


_TESTED: WeakKeyDictionary[nn.Module, _Tested] = WeakKeyDictionary()


def shares_rows(model: nn.Module, tokens: Sequence[int]) -> bool:
    """Whether texts up to the length of this one may share a row with others, and answers of an item with each other.

    The result is remembered for the process: a longer text is tested again if shorter ones passed.

    Args:
        model: a causal language model.
        tokens: a text that the model can read, at least one token.
    """
    tested = _TESTED.setdefault(model, _Tested())
    if len(tokens) > tested.held and len(tokens) < tested.failed:
        if _same_apart(model, tokens):
            tested.held = len(tokens)
        else:
            tested.failed = len(tokens)
    return len(tokens) <= tested.held


def keeps_rows_apart(model: nn.Module) -> bool:
    """Whether the test of `shares_rows` has failed for a text of this model in this process."""
    return _TESTED.get(model, _Tested()).failed < float("inf")


@torch.no_grad()
def _same_apart(model: nn.Module, tokens: Sequence[int]) -> bool:
    """Whether a text and an item in one row get the logits of plain passes, but for rounding.

    How much rounding changes is measured by a plain pass with embeddings that differ in their last digit.
    """
    text, item = packed_text(tokens), _item(tokens)
    places = torch.arange(len(tokens) - 1, -1, -max(1, len(tokens) // _PLACES)).flip(0)
    device = next(model.parameters()).device

    def logits(inputs: dict[str, torch.Tensor], source: torch.Tensor) -> torch.Tensor:
        on_device = {name: values.to(device) for name, values in inputs.items()}
        return read(model, on_device, source.to(device)).logits

    alone = [logits(row_inputs([[text]], False), places)]
    alone += [
        logits(row_inputs([[branch]], False), torch.arange(_PREFIX, len(branch.tokens))) for branch in apart(item)
    ]
    with _rounded_otherwise(model):
        noise = _difference(logits(row_inputs([[text]], False), places), alone[0])
    inside = torch.arange(len(tokens) + _PREFIX, len(tokens) + len(item.tokens))
    try:
        together = logits(row_inputs([[text, item]], True), torch.cat([places, inside]))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        return False
    expected = torch.cat(alone)
    least = max(_LEAST, _NOISE * torch.finfo(next(model.parameters()).dtype).eps) * float(expected.std())
    return _difference(together, expected) <= _NOISE * noise + least


@contextmanager
def _rounded_otherwise(model: nn.Module) -> Iterator[None]:
    """Context in which the entries of the embeddings are changed at random by up to one unit in the last place."""

    def shift(module: nn.Module, arguments: object, output: torch.Tensor) -> torch.Tensor:
        share = torch.rand(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        return output + output * (2 * share - 1) * torch.finfo(output.dtype).eps

    hook = model.get_input_embeddings().register_forward_hook(shift)  # type: ignore[operator]
    try:
        yield
    finally:
        hook.remove()


def _item(tokens: Sequence[int]) -> Packed:
    """An item of one prefix and two branches, made of the tokens of a text."""
    own = [tokens[at % len(tokens)] for at in range(_PREFIX + sum(_BRANCHES))]
    middle = _PREFIX + _BRANCHES[0]
    return Packed(tuple(own), _PREFIX, ((_PREFIX, middle, _PREFIX), (middle, len(own), middle)), 0)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest over positions of the mean over the vocabulary of the difference; infinite if it is not a number."""
    largest = float((found - expected).abs().mean(-1).max())
    return largest if largest == largest else float("inf")

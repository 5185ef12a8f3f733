"""Test on a model whether several texts may share a row of a forward pass, kept apart by a mask.

A mask reaches attention only. Convolutions and recurrent states run on from one text into the next, layers with a
sliding window take a given mask in place of their window or count the window along the row, and some models take no
mask of pairs at all. None of this need raise an error, so one row is compared with plain passes of its texts. Knows a
causal language model and tokens; does not know data.

The test takes seconds on a model of some size, so its result is stored in the cache, under a digest of all that it
depends on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn

from search.evaluation.logits import read
from search.evaluation.packed_sequences import Packed, apart, row_inputs
from search.runtime.files import file_digest
from search.runtime.memory import is_out_of_memory
from search.runtime.remembered import remembered_answer

__all__ = ["APART", "keeps_rows_apart", "shares_rows"]

APART = (
    "in this model, texts that share a row would change each other in spite of the mask between them, so every text "
    "and every answer has a row of its own, and all passes take longer"
)
"""The sentence for the user about a model that `shares_rows` is false for."""

_CODE = ("shared_rows", "packed_sequences", "logits")  # modules here that the result of the test depends on
_PREFIX, _BRANCH = 4, 4  # tokens of the prefix of an item that is tested, and of its last branch
_PLACES = 16  # positions of a branch that are compared
_NOISE = 4.0  # largest difference in units of that of rounding
_LEAST = 1e-4  # smallest difference that counts, in standard deviations of the logits


@dataclass
class _Tested:
    """Lengths, in tokens, of texts and of items up to which the test held, and that of an item for which it failed."""

    text: int = 0
    item: int = 0
    failed: float = float("inf")


_TESTED: WeakKeyDictionary[nn.Module, _Tested] = WeakKeyDictionary()


def shares_rows(
    model: nn.Module, tokens: Sequence[int], item: int = 0, identity: Mapping[str, str] | None = None
) -> bool:
    """Whether texts up to the length of this one may share a row with others, and answers of an item with each other.

    The result is remembered for the process: longer ones are tested again if shorter ones passed.

    Args:
        model: a causal language model.
        tokens: a text that the model can read, at least one token.
        item: number of tokens of the longest item, with its prefix once and all its answers; 0 if no longer than the
            text.
        identity: the digests that tell the model from any other, under which other processes find the result; None if
            it has none, or runs code that they do not cover.
    """
    tested, item = _TESTED.setdefault(model, _Tested()), max(item, len(tokens))
    if (len(tokens) > tested.text or item > tested.item) and item < tested.failed:
        holds = partial(_same_apart, model, tokens, item)
        if holds() if identity is None else remembered_answer(_key(model, tokens, item, identity), holds):
            tested.text, tested.item = max(tested.text, len(tokens)), max(tested.item, item)
        else:
            tested.failed = item
    return len(tokens) <= tested.text and item <= tested.item


def keeps_rows_apart(model: nn.Module) -> bool:
    """Whether the test of `shares_rows` has failed for a text of this model in this process."""
    return _TESTED.get(model, _Tested()).failed < float("inf")


def _key(model: nn.Module, tokens: Sequence[int], item: int, identity: Mapping[str, str]) -> dict[str, object]:
    """All that the result of the test depends on: the model, what computes it and where, the row, and our code."""
    parameter = next(model.parameters())
    on = parameter.device
    return {
        "kind": "rows are shared",
        "model": dict(identity),
        "dtype": str(parameter.dtype),
        "attention": str(getattr(model.config, "_attn_implementation", "")),
        "device": torch.cuda.get_device_name(on)
        if on.type == "cuda"
        else f"{on.type} {torch.backends.cpu.get_cpu_capability()}",
        "versions": [torch.__version__, version("transformers")],
        "row": [list(tokens), item],
        "code": [file_digest(Path(__file__).with_name(f"{name}.py")) for name in _CODE],
    }


@torch.no_grad()
def _same_apart(model: nn.Module, tokens: Sequence[int], length: int) -> bool:
    """Whether two items in a row, one of this length and a short one, get the logits of plain passes but for rounding.

    The first branch of the long item is as long as the text. Its last branch stands far from the prefix that it
    continues. How much rounding changes is measured by a plain pass with embeddings that differ in their last digit.
    """
    items = _item(tokens, max(length, len(tokens) + _BRANCH)), _item(tokens, _PREFIX + 2 * _BRANCH)
    device = next(model.parameters()).device

    def logits(inputs: dict[str, torch.Tensor], source: torch.Tensor) -> torch.Tensor:
        on_device = {name: values.to(device) for name, values in inputs.items()}
        return read(model, on_device, source.to(device)).logits

    alone, inside, start = [], [], 0
    for item in items:
        texts = apart(item)
        for number in sorted({0, len(texts) - 1}):
            end = len(texts[number].tokens)
            places = torch.arange(end - 1, _PREFIX - 1, -max(1, (end - _PREFIX) // _PLACES)).flip(0)
            alone.append((texts[number], places))
            inside.append(places + start + item.branches[number][0] - _PREFIX)
        start += len(item.tokens)
    expected = torch.cat([logits(row_inputs([[text]], False), places) for text, places in alone])
    text, places = alone[0]
    with _rounded_otherwise(model):
        noise = _difference(logits(row_inputs([[text]], False), places), expected[: len(places)])
    try:
        together = logits(row_inputs([items], True), torch.cat(inside))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        return False
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


def _item(tokens: Sequence[int], length: int) -> Packed:
    """An item of about this many tokens, those of a text: a prefix, branches that fill up the length, and one more.

    No branch is longer, with the prefix, than the text, unless the text is very short; the first one is as long, if
    there is room for it.
    """
    most = max(_BRANCH, len(tokens) - _PREFIX)
    starts = [*range(_PREFIX, max(_PREFIX + 1, length - _BRANCH), most), max(_PREFIX + _BRANCH, length - _BRANCH)]
    ends = [*starts[1:], starts[-1] + _BRANCH]
    own = tuple(tokens[at % len(tokens)] for at in range(ends[-1]))
    return Packed(own, _PREFIX, tuple((start, end, start) for start, end in zip(starts, ends, strict=True)), 0)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest over positions of the mean over the vocabulary of the difference; infinite if it is not a number."""
    largest = float((found - expected).abs().mean(-1).max())
    return largest if largest == largest else float("inf")

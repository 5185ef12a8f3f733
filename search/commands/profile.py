"""`search.py profile`: measure what every matrix costs alone at several χ."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from compression.refusal import Refusal
from search.commands.exits import DONE, explain, resumed, say
from search.commands.flags import Parser, add_fields, configuration, parse, set_threads, whole_number
from search.config import AFTERWARDS
from search.runtime.console import Console
from search.runtime.quick_imports import quick_imports

__all__ = ["IGNORED", "levels_text", "run"]

Number = TypeVar("Number", int, float)

_ABOUT = """\
Measure what every matrix costs alone: one site at one χ, all other sites dense, on the search data, next to the cost
that the menu predicts. Writes sensitivity.csv, sensitivity.parquet, heat maps and a summary. --resume continues a sweep
and may add levels."""

_EXAMPLES = """\
examples:
  python search.py profile                                  every matrix at χ 10 to 90 and three fractions
  python search.py profile --chi 10,50,90 --fractions none --out results/three
  python search.py profile --per-head --chi 4:32:4          every attention head alone
  python search.py profile --context 4096 --chi none        k and v at a long context, for the KV cache"""

IGNORED = (
    "agent",
    "budget",
    "target_kept",
    "size",
    "target_bytes_kept",
    "granularity",
    "policy",
    "prior",
    "kl_weight",
    "correct_weight",
    "compression_weight",
    "bytes_weight",
    "latency_weight",
    "reward_repair_tokens",
    *AFTERWARDS,
)
"""Fields of `Config` that a sweep does not use."""


def run(words: list[str]) -> int:
    """Run the command; returns its exit code."""
    given = parse(_parser(), words)
    shown = Console(quiet=given.pop("quiet"))
    chi, fractions, tokens, context = (given.pop(name, None) for name in ("chi", "fractions", "tokens", "context"))
    try:
        config = configuration(given)
        set_threads(config)
        sizes = [
            None if text is None else whole_number(name, text, 64, 10**9)
            for name, text in (("tokens", tokens), ("context", context))
        ]
        with quick_imports():
            from search.profiling import sweep

        levels = None
        if chi is not None or fractions is not None:
            levels = sweep.Levels(
                sweep.CHI if chi is None else tuple(levels_text("chi", chi, int)),
                sweep.FRACTIONS if fractions is None else tuple(levels_text("fractions", fractions, float)),
            )
        with shown:
            folder, text = sweep.profile(config, levels, sizes[0], shown, sizes[1])
    except BaseException as error:
        return explain(error, resumed(shown.folder, "profile"), shown.folder)
    say(f"{text}\n{folder}")
    return DONE


def levels_text(name: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """Parse comma-separated numbers, START:STOP:STEP for whole numbers (both ends included), or none.

    Raises:
        ValueError: anything else, naming `name`.
    """
    rule = "comma-separated numbers, START:STOP:STEP, or none"
    if text == "none":
        return []
    try:
        if kind is int and ":" in text:
            start, stop, step = map(int, text.split(":"))
            if step < 1 or stop < start or (stop - start) // step > 10_000:
                raise ValueError
            return [kind(str(number)) for number in range(start, stop + 1, step)]
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise Refusal(f"{name} must be {rule}, got {text!r:.80}") from None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="search.py profile",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        usage="python search.py profile [FLAGS]",
    )
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument(
        "--chi", metavar="LIST", help="Bond dimensions: 10,50,90 or 10:90:10, or none. Default: 10:90:10."
    )
    sweep.add_argument(
        "--fractions",
        metavar="LIST",
        help="Bond dimensions as fractions of the full χ of each matrix, or none. Default: 0.25,0.5,0.75.",
    )
    sweep.add_argument(
        "--tokens",
        metavar="N",
        help="Largest number of tokens of search text and questions per measurement. Default: 512.",
    )
    sweep.add_argument(
        "--context",
        metavar="N",
        help="Measure only k and v, on one text of N tokens, and how much of the KV cache latents would save.",
    )
    add_fields(parser, without=IGNORED)
    return parser

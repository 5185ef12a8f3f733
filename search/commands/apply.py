"""`search.py apply`: apply a prior to the model it was made for, or to another one."""

from __future__ import annotations

import argparse
from pathlib import Path

from compression.refusal import Refusal
from search.commands.exits import DONE, explain, say
from search.commands.flags import Parser, add_fields, configuration, parse, set_threads
from search.commands.profile import IGNORED
from search.config import EVALUATORS
from search.reporting.tables import text_table
from search.runtime.console import Console
from search.runtime.quick_imports import quick_imports

__all__ = ["run"]

_TARGETS = ("target_kept", "size", "target_bytes_kept")
_ABOUT = """\
Apply a compression prior to a model. On the model that it was made for, its schedule is used unchanged. For another
model it is transferred by family of matrix and relative depth, and then scaled to the parameter budget. Writes
prior.json, schedule.json and a table of what the schedule costs on held-out text."""

_EXAMPLES = """\
examples:
  python search.py apply --prior results/priors/smollm2-135m-instruct-113m.json --out results/applied
  python search.py apply --prior prior.json --model google/gemma-3-270m --out results/on-gemma
  python search.py apply --prior prior.json --target-kept 0.6 --out results/smaller"""


def run(words: list[str]) -> int:
    """Run the command; returns its exit code."""
    given = parse(_parser(), words)
    shown = Console(quiet=given.pop("quiet"))
    clamp, measure = given.pop("clamp"), not given.pop("no_measure")
    rule, profile, file = (given.pop(name, None) for name in ("transfer", "profile", "prior"))
    try:
        target = given.get("target_kept")
        if file is None:
            raise Refusal("prior must be an existing prior.json, got none")
        set_threads(configuration(given))
        from search.priors.format import Prior

        prior = Prior.read(Path(file), clamp)
        if prior.is_small:
            given = {"form": "small", **given}
        if not any(given.get(name) is not None for name in _TARGETS):
            given = {**given, "target_kept": prior.target_kept}
        config = configuration(given)
        with quick_imports():
            from search.pipeline.apply import apply

        with shown:
            path = None if profile is None else Path(profile)
            folder, rows, notes = apply(config, prior, shown, target, rule, measure, path)
    except BaseException as error:
        return explain(error)
    table = f"\n{text_table(rows)}" if rows else ""
    say("\n".join(notes), f"{table}\n{folder}")
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="search.py apply",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        usage="python search.py apply --prior FILE [FLAGS]",
    )
    own = parser.add_argument_group("application")
    own.add_argument(
        "--clamp",
        action="store_true",
        default=False,
        help="Lower every χ that saves no parameters to the largest that does, instead of refusing the prior.",
    )
    own.add_argument(
        "--transfer",
        choices=("price", "chi"),
        help="How to transfer to another model: price keeps how far each matrix departs from the closed form, chi "
        "keeps its relative χ. Default: price if the prior has it, else chi.",
    )
    own.add_argument(
        "--no-measure", action="store_true", default=False, help="Write the schedule without measuring its cost."
    )
    own.add_argument(
        "--profile",
        metavar="DIR",
        help="Folder of a sweep (profile) of this model; its measured sensitivity goes into the new prior.",
    )
    ignored = (name for name in IGNORED if name not in (*_TARGETS, "prior"))
    add_fields(parser, without=(*ignored, *EVALUATORS, "resume"))
    return parser

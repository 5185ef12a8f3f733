"""`search.py prior`: print, compare and check compression priors, and print their JSON Schema."""

from __future__ import annotations

import argparse
from pathlib import Path

from compression.refusal import nearest
from search.commands.exits import DONE, REFUSED, complain, explain, refuse, say
from search.commands.flags import Parser, parse

__all__ = ["run"]

_ACTIONS = {
    "show": "print each file: a bar per block, totals and scores",
    "diff": "compare two files",
    "validate": "check whether each file can be used",
    "schema": "print the JSON Schema of the format",
}


def run(words: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    names = [word for word in words if not word.startswith("-")]
    given = parse(parser, [word for word in words if word.startswith("-")])
    action, files = (names[0] if names else ""), [Path(name) for name in names[1:]]
    if action not in _ACTIONS:
        return refuse(
            f"prior needs one of {', '.join(_ACTIONS)}, got {action!r}; the nearest is {nearest(action, _ACTIONS)}"
        )
    wanted = {"diff": "two files", "schema": "no file"}.get(action, "one file or more")
    if not {"diff": len(files) == 2, "schema": not files}.get(action, bool(files)):
        return refuse(f"prior {action} needs {wanted}, got {len(files)}")
    try:
        return _act(action, files, given["clamp"])
    except BaseException as error:
        return explain(error)


def _act(action: str, files: list[Path], clamp: bool) -> int:
    from search.priors.format import Prior
    from search.priors.text import diff_text, show_text

    if action == "schema":
        say(Prior.published_schema(), end="")
        return DONE
    if action == "validate":
        return _validate(files, clamp)
    priors = [Prior.read(file, clamp) for file in files]
    say(diff_text(*priors) if action == "diff" else "\n".join(map(show_text, priors)), end="")
    return DONE


def _validate(files: list[Path], clamp: bool) -> int:
    """Check all files, even if an earlier one is refused."""
    from search.priors.format import Prior

    code = DONE
    for file in files:
        try:
            prior = Prior.read(file, clamp)
        except ValueError as error:
            complain(str(error))
            code = REFUSED
        else:
            say(f"{file}: ok, {len(prior.sites)} sites of {prior.model.id}, kept {prior.kept_fraction:.4f}")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="search.py prior",
        description="Print, compare and check compression priors.\n\n"
        + "\n".join(f"  prior {name:<9} {about}" for name, about in _ACTIONS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="python search.py prior show|diff|validate FILE... | schema",
    )
    parser.add_argument(
        "--clamp",
        action="store_true",
        help="Lower every χ that saves no parameters to the largest that does, instead of refusing the prior.",
    )
    return parser

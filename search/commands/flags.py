"""Turns the words of a command line into a validated configuration. Knows no command and no model library."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from compression.refusal import Refusal, nearest
from search.commands.exits import REFUSED, complain
from search.config import PLANNERS, RECORDED, Config, read_fields
from search.runtime.run_folder import CONFIG

__all__ = [
    "Parser",
    "add_fields",
    "add_trust",
    "configuration",
    "parse",
    "set_threads",
    "whole_number",
    "whole_numbers",
]


class Parser(argparse.ArgumentParser):
    """An argument parser that refuses with one line."""

    def error(self, message: str) -> NoReturn:
        complain(re.sub(r"^argument --\S+: (?=\w+ must be )", "", message))
        raise SystemExit(REFUSED)


def add_fields(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> Any:
    """Add a flag for every field of `Config` except `without`, in groups; returns the group "output"."""
    groups: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        if name in without or name in RECORDED:
            continue
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        title = str(extra["group"])
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        flag, about = "--" + name.replace("_", "-"), " ".join((field.description or "").split()).replace("%", "%%")
        if field.annotation is bool:
            groups[title].add_argument(flag, action="store_true", dest=name, help=about)
            continue
        if str(extra["rule"]).startswith("one of"):
            rule = str(extra["rule"])
            about += f" {rule[:1].upper()}{rule[1:]}."
        if field.default is not None:
            about += f" Default: {field.default}."
        kind = next((k for k in (int, float) if k in (field.annotation, *get_args(field.annotation))), None)
        convert = str if kind is None else _converter(name, kind, str(extra["rule"]))
        groups[title].add_argument(flag, dest=name, metavar=str(extra["metavar"]), type=convert, help=about)
    output = groups["output"]
    output.add_argument("--config", metavar="FILE", help="JSON file with values of these fields; flags override it.")
    output.add_argument(
        "--quiet", action="store_true", default=False, help="Show no progress, only the result and errors."
    )
    return output


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add the flag that allows the code that comes with a model, to a command without the fields of `Config`."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="Run the code that comes with the model, which can do anything that you can do; on a run, only the code "
        "that the run recorded. Default: such a model is refused.",
    )


def _converter(name: str, kind: type[int] | type[float], rule: str) -> Callable[[str], int | float]:
    def convert(text: str) -> int | float:
        try:
            return kind(text)
        except ValueError:
            raise _Unusable(f"{name} must be {rule}, got {text!r:.80}") from None

    return convert


class _Unusable(argparse.ArgumentTypeError):
    """The value of a flag is not a number."""


def parse(parser: argparse.ArgumentParser, words: list[str]) -> dict[str, Any]:
    """Parsed flags by name. An unknown word ends the program with one line that names the nearest flag."""
    given, unknown = parser.parse_known_args(words)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
        word = unknown[0].split("=")[0]
        hint = f"; the nearest is {nearest(word, known)}" if word.startswith("-") else "; flags begin with --"
        parser.error(f"unknown argument {word!r}{hint}")
    return vars(given)


def configuration(given: Mapping[str, object]) -> Config:
    """The validated configuration: flags override the file of --config, which overrides the resumed run's own values.

    Raises:
        ValueError: one line naming the field or flag.
    """
    flags = dict(given)
    trusted = bool(flags.get("trust_remote_code"))
    file, resume = flags.pop("config", None), flags.get("resume")
    values = {**(read_fields(Path(str(file))) if file is not None else {}), **flags}
    if resume is None:
        return Config.of_file(values, trusted)
    if not (Path(str(resume)) / CONFIG).is_file():
        raise Refusal(f"resume must be the folder of an earlier run, but there is no {Path(str(resume)) / CONFIG}")
    kept = Config.of_run(read_fields(Path(str(resume)) / CONFIG), trusted)
    config = Config.of({**kept.model_dump(exclude={"out", "resume"}), **values})
    before, after = kept.definition(), config.definition()
    if changed := [f"{name} was {before[name]}, is {after[name]}" for name in before if before[name] != after[name]]:
        raise Refusal("a resumed run keeps its configuration, but " + "; ".join(changed))
    if config.agent in PLANNERS and config.budget != kept.budget:
        raise Refusal(
            f"a search by {config.agent} plans with its budget and cannot continue with another one (was "
            f"{kept.budget}, is {config.budget}); start a new search from its result: --prior {resume}/prior.json"
        )
    return config


def set_threads(config: Config) -> None:
    """Set how many threads numerical libraries use. Must be called before they are imported."""
    if config.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)


def whole_number(name: str, text: str, least: int, most: int) -> int:
    """Parse a whole number from `least` to `most`; raises ValueError naming `name`."""
    if not re.fullmatch(r"-?[0-9]{1,30}", text) or not least <= int(text) <= most:
        raise Refusal(f"{name} must be a whole number from {least} to {most}, got {text!r:.80}")
    return int(text)


def whole_numbers(name: str, text: str) -> list[int]:
    """Parse comma-separated whole numbers; raises ValueError naming `name`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise Refusal(f"{name} must be comma-separated whole numbers, got {text!r:.80}") from None

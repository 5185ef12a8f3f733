"""`search.py generate`: let a model answer prompts."""

from __future__ import annotations

import argparse
import sys

from compression.refusal import Refusal
from search.commands.exits import DONE, explain, say
from search.commands.flags import Parser, add_trust, parse
from search.runtime.console import Console
from search.runtime.quick_imports import quick_imports
from search.runtime.streams import read_input, typed

__all__ = ["run"]

_COOLEST, _HOTTEST = 0.01, 100  # temperatures at which logits stay finite and differ

_ABOUT = """\
Let a model answer. The model is an exported folder or anything that --model of a search accepts. With --prompt it gives
one answer. Without it, a conversation starts on a terminal and ends with an empty line; elsewhere the prompt is read
from standard input."""


def run(words: list[str]) -> int:
    """Run the command; returns its exit code."""
    given = parse(_parser(), words)
    shown = Console(quiet=given["quiet"])
    try:
        if not 1 <= given["tokens"] <= 1 << 20:
            raise Refusal(f"tokens must be a whole number from 1 to {1 << 20}, got {given['tokens']}")
        if given["temperature"] and not _COOLEST <= given["temperature"] <= _HOTTEST:
            raise Refusal(f"temperature must be 0 or from {_COOLEST} to {_HOTTEST}, got {given['temperature']}")
        if not 0 <= given["seed"] < 1 << 32:
            raise Refusal(f"seed must be a whole number from 0 to {(1 << 32) - 1}, got {given['seed']}")
        talking = given["prompt"] is None and sys.stdin.isatty()
        prompt = "" if talking else _prompt(given["prompt"])
        with shown, shown.stage("load"):
            with quick_imports():
                import torch

                from search.model.chat import Chat
                from search.model.loading import load_for_use

            torch.manual_seed(given["seed"])
            loaded = load_for_use(given["model"], given["device"], given["trust_remote_code"])
            loaded.must_continue_text("generate")
            chat = Chat(loaded, given["tokens"], given["temperature"], given["latent_cache"])
        while prompt or (talking and (prompt := _asked())):
            chat.answer(prompt, lambda piece: say(piece, end=""))
            say("")
            prompt = ""
    except BaseException as error:
        return explain(error)
    return DONE


def _prompt(given: str | None) -> str:
    """The prompt of --prompt, or else what is on standard input."""
    prompt = read_input() if given is None else typed(given, "prompt")
    if not prompt.strip():
        raise Refusal("prompt must not be empty; give --prompt TEXT, or text on standard input")
    return prompt


def _asked() -> str:
    """A line that the user types; empty at the end of input."""
    try:
        return typed(input("> "), "the prompt").strip()
    except EOFError:
        say("")
        return ""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="search.py generate",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="python search.py generate MODEL [FLAGS]",
    )
    parser.add_argument("model", metavar="MODEL", help="Exported folder, or a model as for --model of a search.")
    parser.add_argument("--prompt", metavar="TEXT", help="Answer this prompt and exit.")
    parser.add_argument(
        "--tokens", metavar="N", type=int, default=256, help="Largest number of tokens of an answer. Default: 256."
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.0,
        help="Sampling temperature; 0 always takes the most probable token. Default: 0.",
    )
    parser.add_argument(
        "--latent-cache",
        action="store_true",
        help="Cache the latents of low-rank k and v instead of keys and values: less memory, more arithmetic.",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="Seed of the sampling. Default: 0.")
    parser.add_argument(
        "--device",
        metavar="NAME",
        default="auto",
        help="Device of the model: auto, cpu, cuda or cuda:N. Default: auto.",
    )
    add_trust(parser)
    parser.add_argument("--quiet", action="store_true", help="Show no progress, only the answer and errors.")
    return parser

"""`search.py heal`: recover the quality of a compressed model by a short training."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from search.commands.exits import DONE, FAILURES, complain, explain
from search.commands.flags import Parser, parse
from search.reporting.tables import text_table
from search.runtime.console import Console

if TYPE_CHECKING:
    from search.healing.run import HealedRun

__all__ = ["run"]

_INTRODUCTION = """\
Heal the compressed model of an earlier run: its searched schedule is repaired block by block, then its cores and norms
are trained towards the dense model for a while. Writes weights and a table before and after into a folder of RUN. An
exported folder DIR is trained as it is, and written as another one. Interrupted, the same command continues."""

_EXAMPLES = """\
examples:
  python search.py heal results/RUN                                 half an hour, on the texts of the default job
  python search.py heal results/RUN --minutes 180 --out healed-3h   longer, elsewhere
  python search.py heal results/RUN --data sampled                  on what the dense model itself writes
  python search.py heal results/RUN --data text+sampled --text-tokens 4000000   on both, longer on a GPU
  python search.py heal results/RUN --data alpaca.json --loss labels   supervised, on instructions of your own
  python search.py heal results/RUN/hf --out healed-model           an exported folder, to another one
  accelerate launch search.py heal results/RUN                      on all GPUs of this machine"""


def run(words: list[str]) -> int:
    """Returns the exit code."""
    given = parse(_parser(), words)
    try:
        from search.export.heal_folder import heal_export
        from search.healing.plan import HealingOptions
        from search.healing.run import heal_folder
        from search.model.loading import is_compressed
        from search.runtime.distributed import Processes

        first = Processes.is_first()
        shown = Console(quiet=given["quiet"] or not first)
        source = Path(given["run"])
        options = HealingOptions(**{key: value for key, value in given.items() if key not in ("quiet", "run", "model")})
        exported = is_compressed(source)
        with shown:
            if exported:
                result = heal_export(source, given["model"], options, shown)
            else:
                result = heal_folder(source, options, shown)
        Processes.end()
    except BaseException as error:
        return explain(error, ["heal", *words])
    if first:
        _tell(result, None if exported else given["run"])
    return FAILURES if result.stopped else DONE


def _tell(result: HealedRun, run: str | None) -> None:
    print(f"\n{text_table(result.rows)}\n{result.folder}")
    if run is not None:
        words = ["python", "search.py", "export", run, "--healed", str(result.folder)]
        print(f"export it with: {shlex.join(words)}")
    if result.stopped:
        complain(f"finished early: {result.stopped}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="search.py heal",
        description=_INTRODUCTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="python search.py heal RUN|DIR [FLAGS]",
    )
    parser.add_argument("run", metavar="RUN|DIR", help="Folder of a finished run, or one that was exported as hf.")
    parser.add_argument(
        "--model", default="default", metavar="NAME", help="Dense model that DIR was made from. Default: default."
    )
    parser.add_argument("--minutes", type=float, default=30.0, metavar="N", help="Of training. Default: 30.")
    parser.add_argument("--tokens", type=int, default=None, metavar="N", help="Of training, in the place of minutes.")
    parser.add_argument(
        "--data",
        default="text",
        metavar="SOURCE",
        help="text (that of the default job), sampled (from the dense model), a .json, .jsonl or .parquet file of "
        "instructions or chats, or a hub id of such; several with + between. Default: text.",
    )
    parser.add_argument(
        "--text-tokens", type=int, default=None, metavar="N", help="Of data; left out, what the time is enough for."
    )
    parser.add_argument(
        "--loss",
        choices=("distill", "labels"),
        default="distill",
        help="What is learned: the dense model's predictions, or the text's own next tokens. Default: distill.",
    )
    parser.add_argument("--hidden-weight", type=float, default=0.0, metavar="W", help="Of matching hidden states too.")
    parser.add_argument("--rate", type=float, default=None, metavar="RATE", help="Largest learning rate of the cores.")
    batch = "Tokens of one step. Default: 512, on a GPU 8192; several GPUs want more."
    parser.add_argument("--batch-tokens", type=int, default=None, metavar="N", help=batch)
    parser.add_argument("--pass-tokens", type=int, default=None, metavar="N", help="Tokens of one pass; less memory.")
    parser.add_argument("--row-tokens", type=int, default=256, metavar="N", help="Length of a text. Default: 256.")
    parser.add_argument("--checkpointing", action="store_true", help="Recompute activations; slower, less memory.")
    parser.add_argument("--gates", action="store_true", help="Train a factor for every output of a layer too.")
    parser.add_argument("--out", default=None, metavar="DIR", help="Left out, a folder in RUN, or beside DIR.")
    parser.add_argument("--quiet", action="store_true", help="No progress; only the result and errors.")
    return parser

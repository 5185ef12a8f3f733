"""`search.py export`: write the result of a run as a folder that other programs load."""

from __future__ import annotations

import argparse
from pathlib import Path

from search.commands.exits import DONE, explain, say
from search.commands.flags import Parser, add_trust, parse
from search.export.forms import DTYPES, FORMATS, QUANTIZE, check_form
from search.runtime.console import Console
from search.runtime.quick_imports import quick_imports

__all__ = ["run"]

_ABOUT = """\
Write the compressed model of a finished run as a folder.

  hf          small; transformers loads it after `import search.hf`, or with trust_remote_code=True without Chisel;
              vLLM serves it if Chisel is installed there, or with --trust-remote-code
  dense       merged matrices that every tool loads (vLLM, llama.cpp's converter, Ollama); it has the quality of the
              compressed model, but the size and speed of the original
  gguf-ready  dense in float16, checked against the requirements of llama.cpp's converter
  plain       small; for results without factors (--form plain): a smaller model of the original's architecture, which
              every tool loads; if the widths of its blocks differ, a DeciLM model for vLLM and, with
              trust_remote_code=True, transformers
  gguf        small; a GGUF file for llama.cpp and Ollama; for results without factors (--form plain), whose blocks may
              have different widths
  compressed-tensors
              small; rounded matrices as vLLM and, with the package compressed-tensors, transformers read them; for
              results of --serve vllm with a size
  mlx         small; rounded matrices as mlx-lm reads them; for results of --serve mlx-lm with a size"""


def run(words: list[str]) -> int:
    """Run the command; returns its exit code."""
    given = parse(_parser(), words)
    shown = Console(quiet=given["quiet"])
    try:
        check_form(given["format"], given["dtype"], given["quantize"])
        folder = Path(given["out"] or Path(given["run"]) / given["format"])
        healed = Path(given["healed"]) if given["healed"] else None
        with shown:
            with quick_imports():
                from search.export.run import ExportForm, export_run
                from search.runtime.run_folder import holding, refuse_used

            refuse_used(folder)
            names = ("format", "dtype", "quantize", "state", "device", "trust_remote_code")
            form = ExportForm(*(given[name] for name in names))
            with holding(folder):
                say(export_run(Path(given["run"]), folder, form, shown, healed))
    except BaseException as error:
        return explain(error)
    say(folder)
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="search.py export",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="python search.py export RUN [FLAGS]",
    )
    parser.add_argument("run", metavar="RUN", help="Folder of a finished run.")
    parser.add_argument("--format", metavar="NAME", default="hf", help=f"One of {', '.join(FORMATS)}. Default: hf.")
    parser.add_argument("--out", metavar="DIR", help="New or empty folder. Default: RUN/FORMAT.")
    parser.add_argument(
        "--dtype",
        metavar="NAME",
        help=f"One of {', '.join(DTYPES)}. Default: bfloat16, but float16 for gguf-ready, gguf, compressed-tensors "
        "and mlx.",
    )
    parser.add_argument(
        "--quantize",
        metavar="NAME",
        default="none",
        help=f"One of {', '.join(QUANTIZE)}. int8 and int4 store all matrices as integers; mixed keeps the cores as "
        "they are and stores all other matrices in 4 bits. Those that begin with q are types of GGUF files, for "
        "--format gguf. The quantized model is measured again. Default: none.",
    )
    parser.add_argument(
        "--state",
        metavar="NAME",
        help="State to export: healed, repaired, or searched (decomposed only). Default: the first of these that the "
        "run has. Any run can be exported repaired.",
    )
    parser.add_argument(
        "--healed", metavar="DIR", help="Folder that search.py heal wrote. Default: the healing of the run itself."
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        default="auto",
        help="Device that makes the model: auto, cpu, cuda or cuda:N. Default: auto.",
    )
    parser.add_argument("--quiet", action="store_true", help="Show no progress, only the result and errors.")
    add_trust(parser)
    return parser

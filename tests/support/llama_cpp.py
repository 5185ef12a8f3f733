"""Runs GGUF files in llama.cpp, which comes with the extra `dev`; each in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

needs_llama_cpp = pytest.mark.skipif(not importlib.util.find_spec("xllamacpp"), reason="needs the package xllamacpp")

BANNED = [*range(94, 257)]
"""Numbers of the tiny tokenizer that are no ASCII: llama.cpp's server leaves bytes of incomplete characters out."""


def run_llama_cpp(file: Path, prompts: list[list[int] | str], tokens: int = 8, top: int = 8) -> list[dict]:
    """The answers of `benchmarks/llama_cpp.py` for these prompts (token ids or texts), without `BANNED`."""
    script = Path(__file__).parents[2] / "benchmarks" / "llama_cpp.py"
    request = {"model": str(file), "prompts": prompts, "tokens": tokens, "top": top, "banned": BANNED}
    ran = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])["answers"]

"""Runs exported files in engines that come with the extra `dev`; each in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

needs_llama_cpp = pytest.mark.skipif(not importlib.util.find_spec("xllamacpp"), reason="needs the package xllamacpp")
needs_mlx = pytest.mark.skipif(not importlib.util.find_spec("mlx_lm"), reason="needs the package mlx-lm")

BANNED = [*range(94, 257)]
"""Numbers of the tiny tokenizer that are no ASCII: llama.cpp's server leaves bytes of incomplete characters out."""


def run_llama_cpp(file: Path, prompts: list[list[int] | str], tokens: int = 8, top: int = 8) -> list[dict]:
    """The answers of `benchmarks/llama_cpp.py` for these prompts (token ids or texts), without `BANNED`."""
    request = {"model": str(file), "prompts": prompts, "tokens": tokens, "top": top, "banned": BANNED}
    return _answers("llama_cpp", [request])[0]


def run_mlx(folders: Sequence[Path], prompts: list[list[int]], tokens: int = 8, top: int = 5) -> list[list[dict]]:
    """The answers of `benchmarks/mlx_engine.py` for these prompts, for every folder."""
    asked = {"prompts": prompts, "tokens": tokens, "top": top}
    return _answers("mlx_engine", [{"model": str(folder), **asked} for folder in folders])


def _answers(script: str, requests: Sequence[dict]) -> list[list[dict]]:
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).parents[2] / "benchmarks" / f"{script}.py")],
        input="\n".join(json.dumps(request) for request in requests),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return [json.loads(line)["answers"] for line in ran.stdout.splitlines()[-len(requests) :]]

"""Writes the end of every benchmark: a Markdown report with its origin, and one line per bar."""

from __future__ import annotations

import operator
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from search.runtime.provenance import environment

__all__ = ["Bar", "made_by", "markdown", "publish", "without_places"]

RESULTS = Path(__file__).resolve().parents[1] / "results"
_RELATIONS = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Bar:
    """A measured figure and the inequality that it should satisfy."""

    name: str
    value: float
    relation: str
    threshold: float

    def __str__(self) -> str:
        met = _RELATIONS[self.relation](self.value, self.threshold)
        return f"bar {self.name} {self.value:.3f} {self.relation} {self.threshold:g} {'ok' if met else 'missed'}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a Markdown table; every column except the first is right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def made_by(module: str) -> str:
    """Returns one sentence that names the command, commit, date and machine of this process."""
    import torch

    facts = environment()
    arguments = [argument for argument in sys.argv[1:] if argument != "--write"]
    gpus = f", {', '.join(names)}" if (names := _gpus(facts)) else ""
    commit = str(facts["commit"])
    commit = commit[:12] + "+" * commit.endswith("+")
    command = without_places(shlex.join(["python", "-m", module, *arguments]))
    threads = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    return (
        f"Made by `{command}` at commit `{commit}` on {str(facts['date'])[:10]}, on {facts['cores']} cores of "
        f"{facts['cpu']}{gpus} with {threads}, Python {facts['python']}, torch {torch.__version__}."
    )


def without_places(command: str) -> str:
    """Returns a command with absolute paths, which name places on one machine, as the name of what stands there."""
    return shlex.join(Path(word).name.upper() if Path(word).is_absolute() else word for word in shlex.split(command))


def publish(module: str, title: str, body: str, bars: Sequence[Bar], write: bool, variant: str = "") -> None:
    """Prints a report and its bars and, if asked to, writes it to results/.

    Args:
        module: dotted name of the benchmark module, which names the file.
        title: heading of the page.
        body: Markdown between the heading and the bars.
        bars: figures to compare with their thresholds.
        write: whether to write results/MODULE-VARIANT-GPU.md, without the parts that are empty.
        variant: distinguishes this report from the usual report of the module; empty for the usual one.

    Raises:
        OSError: the file cannot be written.
    """
    lines = "\n".join(map(str, bars))
    page = f"# {title}\n\n{body}\n\n" + (f"```\n{lines}\n```\n\n" if bars else "") + f"{made_by(module)}\n"
    if write:
        parts = [module.rsplit(".", 1)[-1], _slug(variant), *map(_slug, _gpus(environment())[:1])]
        name = "-".join(filter(None, parts))
        (RESULTS / f"{name}.md").write_text(page, encoding="utf-8")
    print(body, made_by(module), lines, sep="\n\n")


def _gpus(facts: Mapping[str, object]) -> list[str]:
    found = facts.get("gpus")
    return [str(name) for name in found] if isinstance(found, list) else []


def _slug(name: str) -> str:
    """Turns "NVIDIA H100 80GB HBM3" into "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

"""Writes the tables of finished runs on a model of `benchmarks.lab_models` into results/MODEL.md.

    python -m benchmarks.lab_runs qwen2.5-coder-0.5b results/RUN … [--write]

Reads summary.json of every run folder, and from benchmarks.csv the tasks of which `search.py benchmark` has measured 50
items or more. A run on such a model is made by `search.py --model $(python -m benchmarks.lab_models NAME) …`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.lab_models import LAB_MODELS
from benchmarks.report import RESULTS, markdown
from benchmarks.run_table import section

_ITEMS = 50
"""Fewest items of a task that say something."""


def page(model: str, runs: list[Path]) -> str:
    """Markdown of the runs of a model, in the order given."""
    parts = [f"# {model}\n\nA GGUF file in 4 bits (Q4_K_M), read as it is and compared with itself: see"]
    parts[0] += " [benchmarks/lab_models.py](../benchmarks/lab_models.py).\n"
    for run in runs:
        document = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        parts.append(f"## {target(document)}\n\n{_portable(section(document))}")
        if (file := run / "benchmarks.csv").exists() and len(measured := _enough(pd.read_csv(file))):
            parts.append(benchmarks(measured))
    return "\n".join(parts)


def target(document: dict[str, Any]) -> str:
    """What a run was to keep, in words."""
    size = document.get("size")
    return f"Size {size}" if size else f"Kept fraction {document['target_kept']:g} of the compressible matrices"


def benchmarks(measured: pd.DataFrame) -> str:
    """Markdown of benchmark scores with standard errors, a column per model."""
    models = list(dict.fromkeys(measured["model"]))
    rows = []
    for task, found in measured.groupby("task", sort=False):
        by_model = found.set_index("model")
        cells = [
            f"{by_model.value[name]:.3f} ± {by_model.stderr[name]:.3f}" if name in by_model.index else "-"
            for name in models
        ]
        rows.append([task, by_model.metric.iloc[0], int(by_model.n.iloc[0]), *cells])
    return f"Benchmarks, with one standard error:\n\n{markdown(['task', 'metric', 'items', *models], rows)}\n"


def _enough(measured: pd.DataFrame) -> pd.DataFrame:
    return measured[measured["n"] >= _ITEMS]


def _portable(text: str) -> str:
    """A text in which model files have no folder."""
    return re.sub(r"[^\s`]*/([\w.-]+\.gguf)", r"\1", text)


def main() -> None:
    """Prints the page, and writes it if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", choices=LAB_MODELS, help="the model of the runs")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs on it")
    parser.add_argument("--write", action="store_true", help="write results/MODEL.md")
    given = parser.parse_args()
    text = page(given.model, given.runs)
    print(text)
    if given.write:
        (RESULTS / f"{given.model}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

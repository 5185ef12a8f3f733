"""Makes report.html from the files in run folders, one section per topic. Reads files only; loads no model.

A section is left out if its file is missing, as in a run that was interrupted or made by an earlier version.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

from compression.numerics.packed_size import FLOATING
from compression.refusal import Refusal
from search.reporting.charts import heat_map, line_chart, scatter_chart
from search.reporting.documents import (
    BenchmarkLine,
    HealingFile,
    PriorFile,
    SensitivityLine,
    StageLine,
    SummaryFile,
    TrialLine,
    document,
    records,
)
from search.reporting.opened_run import BENCHMARKS, SENSITIVITY
from search.reporting.page import Section, page, table
from search.reporting.tables import SUMMARY_COLUMNS, Column
from search.runtime.console import duration
from search.runtime.run_digest import refuse_changed
from search.runtime.run_folder import PRIOR, STAGES, SUMMARY, TRIALS
from search.runtime.schema import Part

__all__ = ["REPORT", "Run", "report"]

REPORT = "report.html"
_BASELINES = (
    ("lagrangian", "closed-form allocation"),
    ("uniform-bits", "as many bits everywhere"),
    ("uniform", "uniform χ"),
)


@dataclass(frozen=True)
class Run:
    """The contents of a run folder.

    Attributes:
        name: name of the folder.
        summary, prior: contents of summary.json and prior.json; empty if the file is missing.
        trials, benchmarks, sensitivity, stages: rows of the CSV files; empty if the file is missing.
        healings: content of healing.json by the name of the healing's folder.
    """

    name: str
    summary: Mapping[str, Any]
    prior: Mapping[str, Any]
    trials: Sequence[Mapping[str, Any]]
    benchmarks: Sequence[Mapping[str, Any]]
    sensitivity: Sequence[Mapping[str, Any]]
    stages: Sequence[Mapping[str, Any]]
    healings: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a run folder.

        Raises:
            ValueError: the folder holds nothing to report, a file is malformed, or a finished run was changed.
        """
        if not any((folder / name).is_file() for name in (SUMMARY, BENCHMARKS, SENSITIVITY)):
            raise Refusal(f"there is no finished run, profile or benchmark in {folder}: {SUMMARY} is missing")
        if (folder / PRIOR).is_file():
            refuse_changed(folder)
        return cls(
            name=folder.resolve().name,
            summary=_present(SummaryFile, folder / SUMMARY, "the summary"),
            prior=_present(PriorFile, folder / PRIOR, "the prior"),
            trials=records(TrialLine, folder / TRIALS),
            benchmarks=records(BenchmarkLine, folder / BENCHMARKS),
            sensitivity=records(SensitivityLine, folder / SENSITIVITY),
            stages=records(StageLine, folder / STAGES),
            healings={
                path.parent.name: document(HealingFile, path, "the healing")
                for path in sorted(folder.glob("healed*/healing.json"))
            },
        )

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The rows of the final table."""
        return tuple(self.summary.get("rows", ()))

    def row(self, schedule: str) -> Mapping[str, Any]:
        """Return the row of a schedule in the final table; empty if there is none."""
        return next((row for row in self.rows if row.get("schedule") == schedule), {})

    @property
    def result(self) -> Mapping[str, Any]:
        """The last row of the final table, which describes the model that the run delivers."""
        return self.rows[-1] if self.rows else {}


def report(folders: Sequence[Path]) -> str:
    """Return the report of one run, or a comparison of several, as one HTML page.

    Raises:
        ValueError: there is no folder, or `Run.read` refuses one.
    """
    if not folders:
        raise Refusal("a report needs the folder of at least one run")
    runs = [Run.read(folder) for folder in folders]
    sections = [_comparison(runs)] if len(runs) > 1 else []
    for run in runs:
        parts = [part for make in _PARTS if (part := make(run)) is not None]
        if len(runs) > 1:
            parts = [Section(f"{run.name}: {one.title}", one.text, one.figure, one.data) for one in parts]
        sections += parts
    if len(runs) == 1:
        return page(_title(runs[0]), _headline(runs[0]), sections)
    return page(f"{len(runs)} runs", "; ".join(f"{run.name}: {_headline(run)}" for run in runs), sections)


def _title(run: Run) -> str:
    if not run.summary.get("target_kept") or not run.summary.get("model"):
        return run.name
    return f"{run.summary['model']} at kept {run.summary['target_kept']}"


def _headline(run: Run) -> str:
    """Return one sentence that states size, KL and perplexity of the result and its gain over the baselines."""
    result, dense = run.result, run.row("dense")
    if not result or not dense:
        return "This folder holds no results of a search."
    share = result["parameters"] / dense["parameters"]
    size = f"{result['parameters'] / 1e6:.1f} of {dense['parameters'] / 1e6:.1f} million parameters ({share - 1:+.0%})"
    if result.get("bytes") and dense.get("bytes") and result["bytes"] / dense["bytes"] < 0.9 * share:  # fewer bits
        stored = result["bytes"] / dense["bytes"]
        size = f"{result['bytes'] / 1e6:.1f} of {dense['bytes'] / 1e6:.1f} MB ({stored - 1:+.0%})"
    parts = [
        f"{result['schedule']}: {size}",
        f"held-out KL to the dense model {_figure(result.get('kl'))} nats per token",
        f"perplexity {_figure(result.get('perplexity'))} (dense {_figure(dense.get('perplexity'))})",
    ]
    for baseline, words in _BASELINES:
        other = run.row(baseline).get("kl")
        if other and result.get("kl") is not None and result["schedule"] != baseline:
            parts.append(f"KL {result['kl'] / other - 1:+.0%} against {words}")
    return ", ".join(parts) + "."


def _table(run: Run) -> Section | None:
    if not run.rows:
        return None
    comparison = run.summary.get("searched_against_lagrangian_kl") or {}
    text = (
        "KL and perplexity are measured on held-out text, accuracy and P(correct) on questions that the search did not "
        "use. ± marks one standard error. Prefill and decode are times relative to the dense model."
    )
    if comparison:
        relative = "" if comparison.get("relative") is None else f" ({comparison['relative']:+.1%})"
        text += (
            f" The KL of searched minus that of lagrangian is {comparison['value']:+.4f} ±"
            f" {comparison['standard_error']:.4f} nats per token{relative}, paired over {comparison['sequences']}"
            " sequences."
        )
    return Section("Comparison with the baselines", text, table(run.rows, SUMMARY_COLUMNS), run.rows)


def _chi_map(run: Run) -> Section | None:
    sites = run.prior.get("sites") or []
    if not sites:
        return None
    families = list(dict.fromkeys(site["family"] for site in sites))
    strength, label = {}, {}
    for site in sites:
        cell = str(site["block"]), site["family"]
        out, wide = site["shape"]
        strength[cell] = site["parameters"] / (out * wide)
        label[cell] = str(site["chi"]) if site.get("chi") else "smaller" if site.get("bonds") else "dense"
        if site.get("entries"):
            label[cell] = f"p{strength[cell]:.2f}"
        if bits := site.get("bits"):
            label[cell] = f"{label[cell]} {bits}b" if site.get("entries") else f"{bits}b"
            strength[cell] *= bits / FLOATING
    rows = [str(block) for block in sorted({site["block"] for site in sites})]
    data = [
        {key: site.get(key) for key in ("name", "block", "family", "topology", "chi", "entries", "bits")}
        | {"width": ", ".join(f"{bond['width']} of {bond['groups']}" for bond in site.get("bonds") or ()) or None}
        | {"parameters": site["parameters"], "kept": site["parameters"] / (site["shape"][0] * site["shape"][1])}
        for site in sites
    ]
    text = (
        "χ of every matrix in the chosen schedule. Rows are blocks, columns are families; a darker matrix keeps a "
        "larger fraction of its parameters."
    )
    if any(site.get("bonds") for site in sites):
        text += " A matrix that is smaller has fewer rows or columns and no factors."
    if any(site.get("entries") for site in sites):
        text += " p and a fraction: a pruned matrix, which stores that fraction of its entries."
    if any(site.get("bits") for site in sites):
        text += " A number and b: a matrix in so many bits an entry, which is drawn lighter, as if it kept fewer."
    return Section("Bond dimensions", text, heat_map(rows, families, strength, label), data)


def _width_map(run: Run) -> Section | None:
    """The widths of the bonds, from the matrices that read them."""
    sites = run.prior.get("sites") or []
    bonds = [(site["block"], bond) for site in sites for bond in site.get("bonds") or () if bond["side"] == "in"]
    if not bonds:
        return None
    sums: dict[tuple[str, str], list[int]] = {}
    for block, bond in bonds:
        total = sums.setdefault((str(block), bond["name"].rsplit(".", 1)[-1]), [0, 0])
        total[0] += bond["width"]
        total[1] += bond["groups"]
    strength = {cell: width / groups for cell, (width, groups) in sums.items()}
    label = {cell: f"{width} of {groups}" for cell, (width, groups) in sums.items()}
    kinds = list(dict.fromkeys(kind for _, kind in sums))
    rows = [str(block) for block in sorted({site["block"] for site in sites})]
    data = [
        {"bond": bond["name"], "block": block, "width": bond["width"], "groups": bond["groups"]}
        | {"kept": bond["width"] / bond["groups"]}
        for block, bond in bonds
    ]
    text = (
        "Hidden units of MLPs and key/value groups of attention that the chosen schedule keeps, of all. An empty cell "
        "keeps all; a darker one keeps a larger fraction."
    )
    return Section("Widths", text, heat_map(rows, kinds, strength, label), data)


def _anytime(run: Run) -> Section | None:
    kl = [math.nan if row.get("kl") is None else row["kl"] + (row.get("kl_control") or 0.0) for row in run.trials]
    if not any(map(math.isfinite, kl)):
        return None
    best = list(accumulate((value if math.isfinite(value) else math.inf for value in kl), min))
    series = {"trial": list(enumerate(kl, 1)), "best so far": list(enumerate(best, 1))}
    data = [
        {"trial": number, "kl": value, "best": least}
        for number, (value, least) in enumerate(zip(kl, best, strict=True), 1)
    ]
    text = (
        f"KL of each trial of the agent {run.summary.get('agent')} on search data. The table above is measured on "
        "held-out data instead."
    )
    return Section("The search", text, line_chart(series, "trial", "KL, nats per token"), data)


def _front(run: Run) -> Section | None:
    points: dict[str, dict[str, tuple[float, float]]] = {}
    trials = {
        f"trial {row.get('trial')}": (row["parameters"] / 1e6, row["kl"] + (row.get("kl_control") or 0.0))
        for row in run.trials
        if row.get("kl") is not None and row.get("parameters")
    }
    if len({round(x, 2) for x, _ in trials.values()}) > 1:
        points["trials, search data"] = trials
    rows = {row["schedule"]: row for row in run.rows if row.get("kl") is not None}
    if not rows:
        return None
    worst = 2 * max((row["kl"] for name, row in rows.items() if not name.startswith("uniform-")), default=0.0)
    points["schedules, held out"] = {
        name: (row["parameters"] / 1e6, row["kl"]) for name, row in rows.items() if row["kl"] <= worst
    }
    data = [{"of": kind, "name": name, "x": x, "kl": y} for kind, of in points.items() for name, (x, y) in of.items()]
    text = (
        "KL against the number of parameters. A variant of uniform is left out if its KL is more than twice the "
        "largest of the other schedules."
    )
    figure = scatter_chart(points, "million parameters", "KL, nats per token")
    return Section("Quality and size", text, figure, data)


def _benchmarks(run: Run) -> Section | None:
    if not run.benchmarks:
        return None
    models = list(dict.fromkeys(row["model"] for row in run.benchmarks))
    lines: dict[str, dict[str, object]] = {}
    for row in run.benchmarks:
        line = lines.setdefault(row["task"], {"task": row["task"], "metric": row["metric"], "n": row["n"]})
        if row["state"] == "ok":
            line |= {row["model"]: row.get("value"), f"{row['model']} error": row.get("stderr")}
    columns = [Column("task", "task"), Column("metric", "metric"), Column("n", "items", ",d")]
    columns += [Column(model, model, ".3f", f"{model} error") for model in models]
    text = "Prompts and metrics are those of lm-eval; every model answers the same items. ± marks one standard error."
    return Section("Benchmarks", text, table(list(lines.values()), columns), run.benchmarks)


def _healing(run: Run) -> Section | None:
    curves = {
        name: [(look["tokens"] / 1000, _or_nan(look.get("kl"))) for look in healing["looks"]]
        for name, healing in run.healings.items()
    }
    if not any(curves.values()):
        return None
    data = [{"healing": name, **look} for name, healing in run.healings.items() for look in healing["looks"]]
    text = "KL on search data during healing, which trains cores and norms to match the outputs of the dense model."
    outlooks = [f"{healing['outlook']}." for healing in run.healings.values() if healing.get("outlook")]
    figure = line_chart(curves, "thousand tokens", "KL, nats per token")
    return Section("Healing", " ".join([text, *outlooks]), figure, data)


def _sensitivity(run: Run) -> Section | None:
    measured = [row for row in run.sensitivity if row["state"] == "ok" and (row.get("kl") or 0.0) > 0]
    if not measured:
        return None
    sums: dict[tuple[str, str], list[float]] = {}
    for row in measured:
        sums.setdefault((str(row["block"]), row["family"]), []).append(math.log10(row["kl"]))
    means = {cell: fmean(logs) for cell, logs in sums.items()}
    low, high = min(means.values()), max(means.values())
    strength = {cell: (value - low) / (high - low or 1.0) for cell, value in means.items()}
    label = {cell: f"{10**value:.1g}" for cell, value in means.items()}
    blocks = sorted({block for block, _ in means}, key=int)
    families = list(dict.fromkeys(row["family"] for row in measured))
    text = (
        "KL in nats per token when one matrix is compressed and all others are dense: the geometric mean over the "
        "measured χ. A darker cell has a larger KL."
    )
    return Section("Sensitivity", text, heat_map(blocks, families, strength, label), measured)


def _latency(run: Run) -> Section | None:
    latency = run.summary.get("latency") or {}
    if not latency:
        return None
    columns = [
        Column("optimize", "planned for"),
        Column("prefill_ratio", "prefill, time relative to dense", ".3f"),
        Column("decode_ratio", "decode, time relative to dense", ".3f"),
        Column("stored_bytes", "stored bytes", ",d"),
        Column("resident_bytes", "bytes in memory", ",d"),
    ]
    text = (
        "Speed of the searched model relative to the dense one on this machine, at batch size 1 and with a prompt of "
        f"{latency['prompt']} tokens."
    )
    return Section("Speed", text, table([latency], columns))


def _times(run: Run) -> Section | None:
    lines = [{**row, "took": duration(row.get("seconds") or 0.0)} for row in run.stages]
    if not lines:
        return None
    total = duration(sum(row.get("seconds") or 0.0 for row in run.stages))
    text = f"{total} in all, interrupted sessions included. A stage of no time found its results in the cache."
    return Section("Time", text, table(lines, [Column("stage", "stage"), Column("took", "took")]), run.stages)


def _provenance(run: Run) -> Section | None:
    environment = run.summary.get("environment") or {}
    lines = [
        {
            "what": key,
            "value": ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value),
        }
        for key, value in environment.items()
    ]
    lines += [{"what": name, "value": str(value)} for name, value in (run.prior.get("configuration") or {}).items()]
    if not lines:
        return None
    return Section("How it was made", figure=table(lines, [Column("what", "what"), Column("value", "value")]))


#: The sections of one run, in the order of the page.
_PARTS: tuple[Callable[[Run], Section | None], ...] = (
    _table,
    _benchmarks,
    _width_map,
    _chi_map,
    _sensitivity,
    _anytime,
    _front,
    _healing,
    _latency,
    _times,
    _provenance,
)


def _comparison(runs: Sequence[Run]) -> Section:
    rows = [
        {"run": run.name, "agent": run.summary.get("agent"), "target": run.summary.get("target_kept"), **run.result}
        for run in runs
    ]
    columns = [Column("run", "run"), Column("agent", "agent"), Column("target", "target", ".3g"), *SUMMARY_COLUMNS]
    return Section(
        "Final result of each run", "Only runs with the same held-out data can be compared.", table(rows, columns), rows
    )


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) and math.isfinite(value) else "unknown"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _present(schema: type[Part], path: Path, what: str) -> Mapping[str, Any]:
    """The content of a JSON file; empty if there is no such file."""
    return document(schema, path, what) if path.exists() else {}

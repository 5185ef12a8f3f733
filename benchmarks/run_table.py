"""Write the table of a finished run into results/README.md, and a short one into README.md.

    python -m benchmarks.run_table results/RUN

Reads summary.json of the run folder and replaces the text between the two `run table` markers of each file, with the
command, commit, date and machine of the run. Prints one line per bar of the default job.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from search.reporting.tables import SUMMARY_COLUMNS, Column, markdown_table

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- run table: benchmarks/run_table.py -->", "<!-- end of run table -->"
COMPRESSED = ("lagrangian", "searched", "repaired", "healed")
"""The rows whose KL is shown by kind of text."""
CORPORA = (
    Column("schedule", "schedule"),
    Column("kl_prose", "prose", ".4f", "kl_prose_stderr"),
    Column("kl_exam", "questions and answers", ".4f", "kl_exam_stderr"),
    Column("kl_items", "report items", ".4f", "kl_items_stderr"),
    Column("kl_unseen", "novels", ".4f", "kl_unseen_stderr"),
)


def command(made: dict[str, Any]) -> str:
    """Returns the command of a run without the folder that it was given, which changes no figure."""
    return re.sub(r" --out \S+", "", str(made["command"]))


def section(document: dict[str, Any]) -> str:
    """Returns the table as Markdown, with the command, commit, date and machine that produced it."""
    made, difference = document["environment"], document["searched_against_lagrangian_kl"]
    columns = [column for column in SUMMARY_COLUMNS if column.key != "kept_fraction"]
    rows = {row["schedule"]: row for row in document["rows"]}
    closed = rows["lagrangian"]["kl"]
    whitened, uniform = (rows[name]["kl"] / closed for name in ("uniform-whitened", "uniform"))
    low, high = (100 * (difference["value"] + sign * 1.96 * difference["standard_error"]) / closed for sign in (-1, 1))
    threads = f"{made['threads']} thread{'s' if made['threads'] > 1 else ''}"
    repaired = ""
    if "repaired" in rows:
        gain = 100 * (1 - rows["repaired"]["kl"] / closed)
        repaired = f" With repair, at the same size, the KL is {gain:.1f} % lower than that of the closed form."
    if "healed" in rows:
        change = 100 * (rows["healed"]["kl"] / rows.get("repaired", rows["searched"])["kl"] - 1)
        repaired += f"\nHealing for {document['heal_minutes']:g} minutes then changes the KL by {change:+.1f} %."
    return f"""\
{document["model"]} at kept fraction {document["target_kept"]} over the sites, {document["budget"]} evaluations:

{markdown_table(document["rows"], columns)}
KL is the mean over {rows["dense"]["tokens"]:,} held-out tokens. The KL of uniform-whitened is {whitened:.1f} times that
of the closed form, and the KL of uniform is {uniform:.1f} times that of the closed form.
The KL of the searched schedule is {-100 * difference["relative"]:.1f} % lower than that of the closed form. The
difference, paired over {difference["sequences"]} sequences, is {difference["value"]:+.4f} ±
{difference["standard_error"]:.4f} nats per token, or {low:+.1f} to {high:+.1f} % with 95 % confidence.{repaired}
Accuracy is noisy with so few items, so it is shown with its standard error.

KL in nats per token by kind of held-out text:

{markdown_table([rows[name] for name in COMPRESSED if name in rows], CORPORA)}
Made by `{command(made)}` at commit `{made["commit"][:12]}` on {made["date"][:10]}, on {made["cores"]} cores of
{made["cpu"]} with {threads}, Python {made["python"]}, torch {made["packages"]["torch"]}.
"""


SHORT = {
    "dense": "dense",
    "uniform": "uniform χ",
    "lagrangian": "closed form",
    "searched": "searched",
    "healed": "searched, repaired, healed",
}
"""The rows of the short table, and what they are called there."""


def short_section(document: dict[str, Any]) -> str:
    """Markdown of the short table: size, quality and speed of five models."""
    made, rows = document["environment"], {row["schedule"]: row for row in document["rows"]}
    lines = [
        "| model | parameters | KL, nats/token | KL, novels | perplexity, prose | prompt | token |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for key, name in SHORT.items():
        row = rows[key]
        times = [f"{row[ratio]:.2f}" if row.get(ratio) else "1.00" for ratio in ("prefill_ratio", "decode_ratio")]
        size = f"{row['parameters'] / 1e6:.1f} M"
        figures = [f"{row[figure]:.3f}" for figure in ("kl", "kl_unseen")] + [f"{row['perplexity_prose']:.1f}"]
        lines.append(f"| {' | '.join((name, size, *figures, *times))} |")
    table = "\n".join(lines)
    return f"""\
{table}

{document["model"]}, kept fraction {document["target_kept"]} of the compressible matrices. KL to the dense model and
perplexity on held-out text, from sources that calibration and search have read other parts of; the KL on novels is on a
source that nothing else reads. The last two columns are times over the dense model's, for a prompt and for each token
after it (lower is faster). Made by `{command(made)}` at commit
`{made["commit"][:12]}` on {made["date"][:10]}, on {made["cores"]} cores of {made["cpu"]}.
[All figures, with intervals and goals](results/README.md).
"""


def bars(document: dict[str, Any]) -> list[str]:
    """Returns one line `bar NAME VALUE RELATION THRESHOLD ok|missed` per bar."""
    kl = {row["schedule"]: row["kl"] for row in document["rows"]}
    wanted = [
        ("searched_over_lagrangian_kl", kl["searched"] / kl["lagrangian"], "<=", 1.0),
        ("whitened_over_lagrangian_kl", kl["uniform-whitened"] / kl["lagrangian"], ">=", 3.0),
        ("uniform_over_lagrangian_kl", kl["uniform"] / kl["lagrangian"], ">=", 2.0),
    ]
    if "repaired" in kl:
        wanted.append(("repaired_over_searched_kl", kl["repaired"] / kl["searched"], "<=", 1.0))
    return [
        f"bar {name} {value:.3f} {relation} {limit} {'ok' if (value <= limit) == (relation == '<=') else 'missed'}"
        for name, value, relation, limit in wanted
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("run", type=Path, help="a finished run folder")
    document = json.loads((parser.parse_args().run / "summary.json").read_text(encoding="utf-8"))
    for path, written in ((ROOT / "README.md", short_section), (ROOT / "results" / "README.md", section)):
        text = path.read_text(encoding="utf-8")
        if START not in text or END not in text:
            raise SystemExit(f"{path} lacks the markers between which the table goes: {START} … {END}")
        before, _, rest = text.partition(START)
        path.write_text(f"{before}{START}\n\n{written(document)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print("\n".join(bars(document)))


if __name__ == "__main__":
    main()

"""A proxy of one's own: any multiple-choice data as the JSONL file that `--proxy` and `benchmark` take.

    python -m examples.new_proxy exam.csv exam.jsonl      # columns: question, right, wrong_1, wrong_2, …
    python search.py --proxy exam.jsonl

The right choice is put at a place that the question's hash picks, so that its place gives nothing away. The items are
halved by hash into those that a search sees and those that are reported.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from pathlib import Path


def convert(rows: list[dict[str, str]]) -> list[dict[str, object]]:
    """Rows of a table as items: question, choices, and the place of the right one."""
    items: list[dict[str, object]] = []
    for row in rows:
        choices = [text for name, text in sorted(row.items()) if name.startswith("wrong_") and text]
        place = hashlib.sha256(row["question"].encode()).digest()[0] % (len(choices) + 1)
        choices.insert(place, row["right"])
        items.append({"question": row["question"], "choices": choices, "answer": place})
    return items


def main(words: list[str] | None = None) -> None:
    """Read the table, write the file."""
    parser = argparse.ArgumentParser(description="Turn a table of questions into a proxy.")
    parser.add_argument("table", type=Path)
    parser.add_argument("proxy", type=Path)
    given = parser.parse_args(words)
    with given.table.open(encoding="utf-8", newline="") as file:
        items = convert(list(csv.DictReader(file)))
    given.proxy.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")


if __name__ == "__main__":
    main()

"""How to use your own proxy: converts a table of multiple-choice questions to the JSONL file that `--proxy` reads.

    python -m examples.new_proxy exam.csv exam.jsonl      # columns: question, right, wrong_1, wrong_2, …
    python search.py --proxy exam.jsonl

The hash of the question picks the position of the right choice, so that the position reveals nothing. Chisel splits the
items by hash into a half for the search and a half for the final report.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from pathlib import Path


def convert(rows: list[dict[str, str]]) -> list[dict[str, object]]:
    """Converts rows of a table to items with the question, the choices and the index of the right choice."""
    items: list[dict[str, object]] = []
    for row in rows:
        choices = [text for name, text in sorted(row.items()) if name.startswith("wrong_") and text]
        place = hashlib.sha256(row["question"].encode()).digest()[0] % (len(choices) + 1)
        choices.insert(place, row["right"])
        items.append({"question": row["question"], "choices": choices, "answer": place})
    return items


def main(words: list[str] | None = None) -> None:
    """Reads the table and writes the JSONL file."""
    parser = argparse.ArgumentParser(description="Convert a table of questions to a proxy.")
    parser.add_argument("table", type=Path, help="CSV file with the columns question, right, wrong_1, wrong_2, …")
    parser.add_argument("proxy", type=Path, help="JSONL file to write")
    given = parser.parse_args(words)
    with given.table.open(encoding="utf-8", newline="") as file:
        items = convert(list(csv.DictReader(file)))
    given.proxy.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")


if __name__ == "__main__":
    main()

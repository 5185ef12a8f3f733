"""CSV and parquet by pandas: cells survive as they were."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from compression import Refusal
from search.reporting.frames import csv_text, parquet_bytes, parse_records, read_frame, read_records

ROWS = [{"a": 1, "b": 0.1 + 0.2, "c": "x,\ny"}, {"a": None, "b": math.nan, "d": True}]


def test_cells_are_written_exactly_and_missing_ones_are_empty() -> None:
    text = csv_text(ROWS)
    assert text == 'a,b,c,d\n1,0.30000000000000004,"x,\ny",\n,,,True\n'
    assert parse_records(text) == [
        {"a": "1", "b": "0.30000000000000004", "c": "x,\ny", "d": ""},
        {"a": "", "b": "", "c": "", "d": "True"},
    ]


def test_a_frame_of_either_kind_has_numbers(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(csv_text(ROWS))
    (tmp_path / "t.parquet").write_bytes(parquet_bytes([{"a": 1, "b": 0.5}]))
    assert read_frame(tmp_path / "t.csv")["b"].iloc[0] == 0.1 + 0.2
    assert read_frame(tmp_path / "t.csv")["a"].isna().tolist() == [False, True]
    assert read_frame(tmp_path / "t.parquet").to_dict("records") == [{"a": 1, "b": 0.5}]


def test_text_that_reads_like_a_missing_value_stays_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("name\nNA\nnan\n")
    assert read_frame(tmp_path / "t.csv")["name"].tolist() == ["NA", "nan"]


@pytest.mark.parametrize("text", ["a,b\n1,2,3\n4,5,6,7\n", 'a\n"'])
def test_a_broken_table_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(Refusal, match=r"cannot use .*t\.csv"):
        read_records(tmp_path / "t.csv")


def test_no_file_and_an_empty_one_have_no_rows(tmp_path: Path) -> None:
    assert read_records(tmp_path / "t.csv") == []
    (tmp_path / "t.csv").write_text("")
    assert read_records(tmp_path / "t.csv") == []
    with pytest.raises(Refusal, match="there is no"):
        read_frame(tmp_path / "none.csv")

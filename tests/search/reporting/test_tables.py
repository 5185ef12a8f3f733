import csv
import io

from search.reporting.frames import csv_text
from search.reporting.tables import SUMMARY_COLUMNS, Column, markdown_table, occurring, text_table

ROWS = [
    {
        "schedule": "dense",
        "kept_fraction": 1.0,
        "kl": 0.0,
        "kl_unseen": 0.0,
        "perplexity_prose": 13.5,
        "perplexity_exam": 33.5,
        "accuracy": 0.2875,
        "accuracy_stderr": 0.0226,
        "expected_accuracy": 0.26,
        "expected_accuracy_stderr": 0.001,
        "items": 400,
        "parameters": 106168320,
        "bytes": 212336640,
    },
    {"schedule": "searched", "kept_fraction": 0.8, "kl": float("nan"), "perplexity_prose": None, "items": 400},
]


def test_text_columns_are_aligned_and_figures_have_their_format():
    lines = text_table(ROWS).splitlines()
    assert len(lines) == 4
    assert "106,168,320" in lines[2]
    assert "0.287 ± 0.023" in lines[2] or "0.288 ± 0.023" in lines[2]
    assert lines[0].index("items") + len("items") == lines[2].index("400") + 3 == lines[3].index("400") + 3


def test_what_was_not_measured_is_a_dash_never_a_number():
    assert text_table(ROWS).splitlines()[3].split()[:4] == ["searched", "0.800", "-", "-"]
    assert "nan" not in text_table(ROWS) + markdown_table(ROWS) + csv_text(ROWS)


def test_markdown_has_one_cell_for_every_column():
    lines = markdown_table(ROWS).splitlines()
    assert all(line.count("|") == len(SUMMARY_COLUMNS) + 1 - 2 for line in lines)
    assert lines[1].startswith("| --- | ---: |")
    assert "a\\|b" in markdown_table([{"name": "a|b"}], [Column("name", "name")])


def test_a_column_that_no_row_has_is_left_out():
    assert "prefill" not in text_table(ROWS) + markdown_table(ROWS)
    timed = [{**ROWS[0]}, {**ROWS[1], "prefill_ratio": 0.875, "decode_ratio": None}]
    assert [column.key for column in occurring(timed, SUMMARY_COLUMNS)] == [column.key for column in SUMMARY_COLUMNS]
    assert text_table(timed).splitlines()[3].split()[-2:] == ["0.88", "-"]


def test_csv_has_every_key_and_reads_back():
    rows = list(csv.DictReader(io.StringIO(csv_text([{"a": 1, "b": "x,\ny"}, {"a": None, "c": 0.1}]))))
    assert rows == [{"a": "1", "b": "x,\ny", "c": ""}, {"a": "", "b": "", "c": "0.1"}]


def test_csv_keeps_floats_exactly():
    value = 0.1 + 0.2
    assert float(csv_text([{"kl": value}]).splitlines()[1]) == value


def test_a_table_without_rows_still_has_its_heading():
    assert text_table([]).startswith("schedule")
    assert csv_text([]) == "\n"

"""Rows as CSV and parquet, by pandas. Knows plain values and files; does not know what a table is about.

Functions import pandas when they are called: that takes a third of a second, and most commands need it late or never.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compression.refusal import Refusal
from compression.storage.whole_files import read_file
from search.runtime.outside_text import csv_cell, csv_original

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["csv_text", "frame_of", "parquet_bytes", "parse_records", "read_frame", "read_records"]

Row = Mapping[str, object]


def csv_text(rows: Sequence[Row]) -> str:
    """CSV with every key that occurs, in the order of first occurrence; None and non-finite numbers are empty cells."""
    import pandas as pd

    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key)) for key in keys] for row in rows]
    heading = [csv_cell(key) for key in keys]
    text: str = pd.DataFrame(cells, columns=heading, dtype=object).to_csv(index=False, lineterminator="\n")
    return text


def frame_of(rows: Sequence[Row]) -> pd.DataFrame:
    """The rows as a data frame."""
    import pandas as pd

    return pd.DataFrame(list(rows))


def parquet_bytes(rows: Sequence[Row]) -> bytes:
    """The rows as a parquet file."""
    out = io.BytesIO()
    frame_of(rows).to_parquet(out, index=False)
    return out.getvalue()


def parse_records(text: str) -> list[dict[str, str]]:
    """The cells of a CSV text as they stand, by column; an empty text gives no rows, a short line empty cells.

    Raises:
        Refusal: no CSV, or a line with more cells than the heading.
    """
    import pandas as pd

    try:
        frame = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False, skip_blank_lines=True)
    except pd.errors.EmptyDataError:
        return []
    except (pd.errors.ParserError, ValueError) as error:
        raise Refusal(" ".join(str(error).split())) from None
    frame = _original(frame)
    return [dict(zip(frame.columns, cells, strict=True)) for cells in frame.itertuples(index=False, name=None)]


def read_records(path: Path) -> list[dict[str, str]]:
    """The cells of a CSV file as they stand; no rows if there is no such file.

    Raises:
        Refusal: as `parse_records`, or not UTF-8; it names the file.
    """
    if not path.exists():
        return []
    try:
        return parse_records(read_file(path).decode("utf-8-sig"))
    except OSError as error:
        raise Refusal(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise Refusal(f"cannot use {path}: {error}") from None


def read_frame(path: Path) -> pd.DataFrame:
    """A CSV or parquet file as a data frame with numbers as numbers; empty cells are missing values.

    Raises:
        Refusal: no such file, or not a table.
    """
    import pandas as pd

    if not path.is_file():
        raise Refusal(f"there is no {path}")
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        return _original(pd.read_csv(path, keep_default_na=False, na_values=[""]))
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except ValueError as error:  # pandas' and pyarrow's errors of a broken file, and bytes that are not UTF-8
        raise Refusal(f"cannot use {path}: {' '.join(str(error).split())}") from None


def _original(frame: pd.DataFrame) -> pd.DataFrame:
    """The table as it was before `csv_text` guarded cells that a spreadsheet could take for formulas."""
    import pandas as pd

    for name in frame.columns:
        if not pd.api.types.is_numeric_dtype(frame[name]):
            frame[name] = frame[name].map(csv_original)
    return frame.rename(columns=csv_original)


def _cell(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else csv_cell(value)

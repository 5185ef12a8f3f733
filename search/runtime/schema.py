"""Checks a document that was read from a file against its schema, and says in one line what is wrong with it.

Knows pydantic's schemas; does not know any document. A schema states the type, the range and the length of all that a
reader uses, so that no value in a file can make it fail later.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from compression.refusal import Refusal

__all__ = ["Amount", "Cell", "Figure", "Line", "Part", "Size", "Word", "checked"]

_LARGEST = 2**53  # the largest whole number that every float holds exactly


class Part(BaseModel):
    """Base of schemas of JSON. Fields without a rule are kept as they are: earlier and later versions write others."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)


class Line(Part):
    """Base of schemas of a table's lines, whose cells are text."""

    model_config = ConfigDict(strict=False)


Word = Annotated[str, Field(max_length=10_000)]
"""A name or a sentence."""
Size = Annotated[int, Field(ge=1, le=_LARGEST)]
"""A number of parameters, bytes or features, at least 1."""
Amount = Annotated[int, Field(ge=0, le=_LARGEST)]
"""A count that may be 0."""
Figure = Annotated[float, Field(ge=-1e300, le=1e300)]
"""A measured number."""
Cell = Annotated[Figure | None, BeforeValidator(lambda text: None if text == "" else text)]
"""A cell of a table in text form: a number, or nothing."""


def checked(schema: Any, value: object, path: Path | None = None) -> Any:
    """Return a value as its schema describes it.

    Args:
        schema: a pydantic model, a dataclass, or a type such as a list of models.
        value: what was read.
        path: the file, for the message; None if the caller names it.

    Raises:
        Refusal: the value does not fit. The message is one line with file, field, rule and value.
    """
    before = "" if path is None else f"cannot use {path}: "
    try:
        return TypeAdapter(schema).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        rule = re.sub(r"^(Value error, |Assertion failed, )", "", first["msg"])
        rule = re.sub(r"^(Input|String|Value) should (be|have|match)", r"must \2", rule)
        if first["type"] == "missing":
            raise Refusal(f"{before}{where} is missing") from None
        raise Refusal(f"{before}{where} {rule}, got {first['input']!r:.80}") from None

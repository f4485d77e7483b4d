"""What a cell of a dataset means: whether it holds anything, as an id, as a right answer.

A data frame keeps a column of integers as floats as soon as one is missing, and has NaN in the gap. So a float that is
whole is read as the integer that it was, and NaN as nothing. Knows nothing of rows, files or options.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from decimal import Decimal
from numbers import Real
from typing import Any

MAX_LEVELS = 200
"""How deep objects and lists may nest, so that everything that walks them can."""
_FLOAT = re.compile(r"-?\d+\.0|-?\d(\.\d+)?e[+-]\d\d+")
TRUE_AND_FALSE = {True: ("true", "True", "TRUE"), False: ("false", "False", "FALSE")}


def is_too_deep(value: Any, text: str | bytes) -> bool:
    """Say whether what a JSON text holds nests more than `MAX_LEVELS` deep."""
    opened = text.count("{") + text.count("[") if isinstance(text, str) else text.count(b"{") + text.count(b"[")
    return opened > MAX_LEVELS and _levels(value) > MAX_LEVELS


def _levels(value: Any) -> int:
    levels, layer = 0, [value]
    while layer := [inner for outer in layer if isinstance(outer, (dict, list)) for inner in _inside(outer)]:
        levels += 1
    return levels


def _inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def lookup(values: Any, path: str) -> Any:
    """Return what stands under a name, or else under a dotted path through objects; None where nothing does."""
    if not isinstance(values, dict):
        return None
    if path in values or "." not in path:
        return values.get(path)
    dots = (i for i, character in enumerate(path) if character == ".")
    inner = (lookup(values[path[:i]], path[i + 1 :]) for i in dots if path[:i] in values)
    return next((value for value in inner if value is not None), None)


def is_missing(value: Any) -> bool:
    """Say whether a cell holds nothing: null, or what data frames and Arrow have in its place."""
    return value is None or (isinstance(value, (Real, Decimal)) and value != value)


def is_whole(number: Any) -> bool:
    """Say whether a number, which may be infinite or NaN, is an integer by value."""
    return isinstance(number, int) or bool(number == number and abs(number) != float("inf") and number == int(number))


def without_fraction(value: Any) -> Any:
    """Return a float or decimal that is whole as an integer, and whatever else as it is."""
    return int(value) if isinstance(value, (float, Decimal)) and is_whole(value) else value


def as_id(value: Any) -> str | int | float | None:
    """Return a cell as an id of a type that JSON has; None where the cell is empty, a list or an object."""
    if isinstance(value, (str, int)):
        return value
    if is_missing(value) or isinstance(value, (list, tuple, dict)):
        return None
    value = without_fraction(value)
    return value if isinstance(value, (int, float)) and abs(value) != float("inf") else _as_text(value)


def right_answers(reference: Any, typed: bool = True) -> list[str]:
    """Return the right answers, as texts, that a row's reference holds: one value, or a list of alternatives.

    Numbers, booleans and dates have each spelling in which people write them: 4.0 is `4` and `4.0`, true is `true`,
    `True` and `TRUE`. Missing values are no answers; an empty list is the answer `[]`.

    Args:
        reference: The cell.
        typed: Whether text is meant to be text; in CSV it may be a number as well, or a boolean.
    """
    if isinstance(reference, str):
        return [reference] if typed else [reference, *_spellings(_read(reference))]
    several = reference if isinstance(reference, (list, tuple)) and reference else [reference]
    return [text for one in several if not is_missing(one) for text in dict.fromkeys(_spellings(one))]


def _spellings(value: Any) -> Iterator[str]:
    if isinstance(value, bool):
        yield from TRUE_AND_FALSE[value]
        return
    if isinstance(value, (float, Decimal)) and abs(value) != float("inf"):
        exact = value if isinstance(value, Decimal) else Decimal(repr(value))
        yield str(int(value)) if is_whole(value) else f"{exact.normalize():f}"
        yield f"{exact:f}"
    if isinstance(value, datetime):
        yield str(value)
        if value == datetime(value.year, value.month, value.day, tzinfo=value.tzinfo):  # a date, as pandas keeps it
            yield value.date().isoformat()
    yield _as_text(value)


def _read(text: str) -> Any:
    """Return what a data frame has written as text: a float or a boolean, or else the text."""
    if _FLOAT.fullmatch(text):
        return float(text)
    return {"true": True, "false": False}.get(text.lower(), text)


def _as_text(value: Any) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.hex()
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value.isoformat() if hasattr(value, "isoformat") else value)

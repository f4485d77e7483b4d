"""What cells mean that passed through a data frame: gaps, ids, right answers."""

from __future__ import annotations

import datetime as dt
import json
import math
import uuid
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpipe.cells import as_id, is_missing, right_answers, without_fraction

NAN = math.nan


@pytest.mark.parametrize("value", [None, NAN, np.float32("nan"), np.float64("nan"), Decimal("NaN")])
def test_null_and_nan_are_nothing(value: Any) -> None:
    assert is_missing(value)
    assert as_id(value) is None
    assert right_answers(value) == right_answers([value]) == []


@pytest.mark.parametrize("value", [0, 0.0, "", "nan", False, [], math.inf, Decimal(0), b""])
def test_all_else_is_something(value: Any) -> None:
    assert not is_missing(value)


@given(st.integers(-(2**53), 2**53))
def test_an_integer_that_a_data_frame_made_a_float_is_that_integer(number: int) -> None:
    as_floats = pd.Series([number, None]).tolist()
    assert without_fraction(as_floats[0]) == number and type(without_fraction(as_floats[0])) is int
    assert as_id(as_floats[0]) == number and is_missing(as_floats[1])
    assert str(number) in right_answers(as_floats[0])


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists))
def test_every_value_of_json_is_an_id_or_none_and_has_right_answers_that_are_texts(value: Any) -> None:
    json.dumps(as_id(value), allow_nan=False)
    assert all(isinstance(text, str) for text in right_answers(value))


@pytest.mark.parametrize(
    ("value", "id"),
    [
        ("a", "a"),
        (3, 3),
        (3.0, 3),
        (1.5, 1.5),
        (1e16, 10**16),
        (math.inf, "inf"),
        (Decimal("2.00"), 2),
        (Decimal("2.50"), "2.50"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (dt.date(2024, 1, 2), "2024-01-02"),
        (dt.datetime(2024, 1, 2, 3, tzinfo=dt.UTC), "2024-01-02T03:00:00+00:00"),
        (b"k7", "k7"),
        (b"\xff\x00", "ff00"),
        ([1], None),
        ({"a": 1}, None),
    ],
)
def test_ids_are_text_or_numbers_that_json_has(value: Any, id: Any) -> None:
    assert as_id(value) == id
    assert type(as_id(value)) is type(id)


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("4.0", ["4.0"], ["4"]),
        (4, ["4"], ["4.0"]),
        (4.0, ["4", "4.0"], ["4.00"]),
        (1e6, ["1000000", "1000000.0"], []),
        (-0.5, ["-0.5"], ["0.5"]),
        (1e-5, ["0.00001", "1e-05"], []),
        (1e22, ["10000000000000000000000"], []),
        (True, ["true", "True", "TRUE"], ["1", "yes"]),
        (False, ["false", "False"], ["true"]),
        (Decimal("1.10"), ["1.10", "1.1"], ["1.100"]),
        (Decimal("1E+3"), ["1000"], []),
        (dt.date(2024, 1, 2), ["2024-01-02"], []),
        (dt.datetime(2024, 1, 2), ["2024-01-02", "2024-01-02 00:00:00", "2024-01-02T00:00:00"], []),
        (dt.datetime(2024, 1, 2, 3), ["2024-01-02 03:00:00", "2024-01-02T03:00:00"], ["2024-01-02"]),
        (uuid.UUID(int=1), ["00000000-0000-0000-0000-000000000001"], []),
        (b"Paris", ["Paris"], []),
        ([4.0, None, "four", NAN, True], ["4", "four", "true"], ["nan", "None"]),
        ([["a", 1]], ['["a", 1]'], []),
        ({"a": 1.5}, ['{"a": 1.5}'], []),
        ([], ["[]"], [""]),
    ],
)
def test_a_reference_has_every_spelling_in_which_people_write_it(
    reference: Any, right: list[str], wrong: list[str]
) -> None:
    found = right_answers(reference)
    assert set(right) <= set(found) and not set(wrong) & set(found)

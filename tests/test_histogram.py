"""Numbers → exact counts, in bars."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llmpipe.histogram import FEWEST_BARS, MOST_BARS, TICKS, Bar, even_bars, log_bars


def bars_of(values: list[Any], kind: Callable[[list[Any]], list[Bar]]) -> list[Bar]:
    """Return the bars, having checked that each counts its numbers exactly."""
    bars = kind(values)
    assert [bar.size for bar in bars] == [sum(bar.start <= value < bar.end for value in values) for bar in bars]
    assert sum(bar.size for bar in bars) == len(values)
    assert [bar.end for bar in bars[:-1]] == [bar.start for bar in bars[1:]]
    assert len(bars) % TICKS == 0
    assert not bars or FEWEST_BARS <= len(bars) <= MOST_BARS
    return bars


@given(st.lists(st.integers(0, 10**6) | st.integers(0, 300), max_size=200))
def test_even_bars_count_every_integer_where_it_belongs(values: list[int]) -> None:
    widths = {bar.end - bar.start for bar in bars_of(values, even_bars)}
    assert len(widths) <= 1


@given(st.lists(st.floats(1e-6, 1e6), max_size=200))
def test_logarithmic_bars_count_every_time_where_it_belongs(values: list[float]) -> None:
    bars_of(values, log_bars)


def test_small_integers_have_a_bar_each() -> None:
    assert bars_of([0, 3, 3, 11], even_bars)[:4] == [(0, 1, 1), (1, 2, 0), (2, 3, 0), (3, 4, 2)]


def test_one_time_stands_in_the_middle() -> None:
    sizes = [bar.size for bar in bars_of([0.25] * 5000, log_bars)]
    assert sizes.index(5000) in (MOST_BARS // 2 - 1, MOST_BARS // 2)


def test_a_time_of_zero_has_a_place_on_the_logarithmic_axis() -> None:
    assert sum(bar.size for bar in log_bars([0.0])) == 1

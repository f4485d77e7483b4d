"""Numbers → the bars of a histogram: how many of them each of a few intervals has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MOST_BARS = 32
FEWEST_BARS = 12
"""Fewer would look like blocks."""
TICKS = 4
"""Labelled parts of an axis; even and logarithmic bars are a multiple of so many."""
SHORTEST = 1e-6
"""Counted in place of zero, which has no logarithm."""
LEAST_RATIO = 2 ** (1 / 128)
"""Least ratio of a logarithmic bar's end to its start: numbers that differ by less are as good as equal."""


class Bar(NamedTuple):
    """How many values there are from `start` up to `end`, the end excluded."""

    start: float
    end: float
    size: int


def bars(values: Sequence[float], edges: Sequence[float]) -> list[Bar]:
    """Count the values between each edge and the next; the last edge is greater than all of them."""
    sizes, _ = np.histogram(values, edges)
    return [Bar(*bar) for bar in zip(edges, edges[1:], sizes.tolist(), strict=False)]


def even_bars(values: Sequence[float]) -> list[Bar]:
    """Return bars of one width, from 0. It is a power of two, so that integers of any size share them evenly."""
    if not len(values):
        return []
    largest, width = max(values), 1
    while largest >= width * MOST_BARS:
        width *= 2
    count = max(FEWEST_BARS, -(-int(largest // width + 1) // TICKS) * TICKS)
    return bars(values, range(0, (count + 1) * width, width))


def log_bars(values: Sequence[float]) -> list[Bar]:
    """Return bars that each end at the same multiple of their start, with the values, of 0 or more, in the middle."""
    if not len(values):
        return []
    some = np.maximum(np.asarray(values, dtype=np.float64), SHORTEST)
    low, high = np.log(some.min()), np.log(some.max())
    # A little more than the values span, so that the outermost are within the edges, whatever is rounded.
    half = max((high - low) / 2 * (1 + 1e-9) + 1e-9, MOST_BARS / 2 * np.log(LEAST_RATIO))
    middle = (low + high) / 2
    return bars(some, np.exp(np.linspace(middle - half, middle + half, MOST_BARS + 1)).tolist())  # type: ignore[arg-type]

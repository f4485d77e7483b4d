"""Exact counts of numbers, in memory that does not grow with how many there are, and the bars drawn of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

MOST_BARS = 32
FEWEST_BARS = 12
"""Fewer would look like blocks."""
TICKS = 4
"""Labelled parts of an axis; every histogram has a multiple of so many bars."""
STEPS = 128
"""Bins from one power of two to the next."""
BLOCK = 4096
"""Numbers that are counted together, because one by one would take several times as long."""
SHORTEST = 1e-6
"""Counted in place of zero, which has no logarithm."""


class Bar(NamedTuple):
    """How many values there are from `start` up to `end`, the end excluded."""

    start: float
    end: float
    size: int


class Histogram:
    """Counts numbers of 0 or more, in bins so narrow that bars can be made of them without splitting one.

    A bin is 1/128 as wide as the power of two below its numbers. Below 256, every integer has one for itself.
    """

    def __init__(self) -> None:
        self._bins: Counter[int] = Counter()
        self._held: list[float] = []

    def add(self, value: float) -> None:
        """Count one number."""
        self._held.append(value)
        if len(self._held) >= BLOCK:
            self._count()

    def _count(self) -> None:
        values = np.asarray(self._held, dtype=np.float64)
        self._held.clear()
        mantissas, exponents = np.frexp(np.where(values > 0, values, SHORTEST))
        bins = exponents.astype(np.int64) * STEPS + (mantissas * (2 * STEPS)).astype(np.int64)
        found, sizes = np.unique(bins, return_counts=True)
        self._bins.update(dict(zip(found.tolist(), sizes.tolist(), strict=True)))

    def even_bars(self) -> list[Bar]:
        """Return bars of one width, from 0. It is a power of two, so that no bin lies in two bars."""
        self._count()
        if not self._bins:
            return []
        largest = _start_of(max(self._bins))
        width = 1
        while largest >= width * MOST_BARS:
            width *= 2
        edges = [i * width for i in range(_rounded(int(largest / width) + 1) + 1)]
        return self._bars(edges, lambda one: int(_start_of(one) / width))

    def log_bars(self) -> list[Bar]:
        """Return bars that each end at about the same multiple of their start, around the numbers there are."""
        self._count()
        if not self._bins:
            return []
        first, last = min(self._bins), max(self._bins)
        step = -(-(last - first + 1) // MOST_BARS)
        used = (last - first) // step + 1
        first -= (_rounded(used) - used) // 2 * step
        edges = [_start_of(first + i * step) for i in range(_rounded(used) + 1)]
        return self._bars(edges, lambda one: (one - first) // step)

    def _bars(self, edges: Sequence[float], bar_of: Callable[[int], int]) -> list[Bar]:
        sizes = [0] * (len(edges) - 1)
        for one, size in self._bins.items():
            sizes[bar_of(one)] += size
        return [Bar(*bar) for bar in zip(edges, edges[1:], sizes, strict=False)]


def _start_of(one: int) -> float:
    # `frexp` has mantissas from 1/2, so the bins of an exponent are numbered from STEPS, not from 0.
    exponent, step = divmod(one - STEPS, STEPS)
    return math.ldexp((step + STEPS) / (2 * STEPS), exponent)


def _rounded(bars: int) -> int:
    return max(FEWEST_BARS, -(-bars // TICKS) * TICKS)

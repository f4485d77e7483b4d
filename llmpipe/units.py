"""Figures in words: each in the unit that suits it, a dash where there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping


def count(value: float | None) -> str:
    """Return a number without its fraction."""
    return "–" if value is None else f"{value:,.0f}"


def number(value: float | None) -> str:
    """Return a number with three digits, or with all that stand before the point."""
    if value is None:
        return "–"
    decimals = 0 if value == int(value) else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def percent(value: float | None) -> str:
    """Return a share."""
    return "–" if value is None else f"{value:.1%}"


def memory(value_mb: float | None) -> str:
    """Return an amount of memory."""
    if value_mb is None:
        return "–"
    return f"{value_mb:,.0f} MB" if value_mb < 10_000 else f"{value_mb / 1000:,.1f} GB"


def seconds(value_s: float | None) -> str:
    """Return a time in the unit that suits it."""
    if value_s is None:
        return "–"
    if value_s < 60:
        unit, scale = ("s", 1) if value_s >= 1 or not value_s else ("ms", 1e3) if value_s >= 1e-3 else ("µs", 1e6)
        return f"{number(value_s * scale)} {unit}"
    minutes, rest = divmod(round(value_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def words(name: str) -> str:
    """Return the name of a figure as one reads it."""
    return name.replace("_", " ")


def shares(times_s: Mapping[str, float | None]) -> str:
    """Return the percentiles of a time."""
    return ", ".join(f"{name} {seconds(times_s[name])}" for name in ("p50", "p90", "p99"))

"""Why rows failed: the most frequent reasons, each with how many rows it had and one of them, in bounded memory.

Reasons that differ in numbers or in what they quote are one: `line 3: 'a' is no chat` has the shape of
`line 71: 'b' is no chat`. Of ever new shapes the frequent ones stay, by the algorithm of Misra and Gries (1982): where
all places are taken, each shape loses a row, and the new one is dropped.
"""

from __future__ import annotations

import re
from typing import Any

SHAPES = 200
"""How many are counted at once."""
SHOWN = 10
_DIFFERS = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\d+(?:[.,]\d+)*")
_LONGEST = 500


class Failures:
    """Counts rows by the shape of their reasons."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, Any]] = {}
        self._exact = True
        """Whether no row was dropped."""
        self._row: int | None = None

    def add(self, index: int, file: str, line: int, reason: str) -> None:
        """Count a row; of its samples, which come one after another, the first that failed says why."""
        if index == self._row:
            return
        self._row = index
        shape = _DIFFERS.sub("#", reason[:_LONGEST])
        if shape in self._found:
            self._found[shape]["rows"] += 1
        elif len(self._found) < SHAPES:
            self._found[shape] = {"rows": 1, "reason": reason[:_LONGEST], "file": file, "line": line}
        else:
            self._exact = False
            for found in self._found.values():
                found["rows"] -= 1
            self._found = {shape: found for shape, found in self._found.items() if found["rows"]}

    def most_frequent(self) -> list[dict[str, Any]]:
        """Return the reasons of the most rows; each with `rows`, and `file` and `line` of one.

        Where not all could be counted, `exact` is False, and a reason has at least so many rows.
        """
        frequent = sorted(self._found.values(), key=lambda found: -found["rows"])[:SHOWN]
        return [{**found, "exact": self._exact} for found in frequent]

"""A permutation of rows that is the same everywhere and always, and the rows in its order.

No format lets one jump from row to row in all its guises. So a window of rows is held at a time, and the files are read
once for each window: `limit` makes that once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from llmpipe.records import Row

WINDOW_ROWS, WINDOW_BYTES = 2**16, 2**28
"""Most rows, and about most bytes of rows, that are held at a time."""
Positions = np.ndarray[Any, np.dtype[np.int64]]


def permutation(rows: int, seed: int) -> Positions:
    """Return the positions of so many rows in random order; 16 bytes a row are needed for it."""
    # SplitMix64 of seed and position: numpy's own generators may change between versions.
    z = np.arange(1, rows + 1, dtype=np.uint64) + np.uint64(seed % 2**32 << 32)
    for shift, factor in ((0, 0x9E3779B97F4A7C15), (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift)) if shift else z) * np.uint64(factor)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


def rows_at(positions: Positions, rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """Yield the rows that stand at some positions, in the order of these.

    Args:
        positions: Each once.
        rows: Reads all rows from the first one on.
    """
    start = 0
    while start < len(positions):
        window: list[int] = positions[start : start + WINDOW_ROWS].tolist()
        places = {position: place for place, position in enumerate(window)}
        held = _Held(len(window))
        for position, row in enumerate(rows()):
            if position in places and places[position] < held.end:
                row.position = position
                held.add(places[position], row)
                if len(held.rows) == held.end:
                    break
        yield from held.in_order()
        start += held.end


class _Held:
    """The rows of a window by their places in it, up to the place from which on they would be too large together."""

    def __init__(self, end: int) -> None:
        self.end = end
        self.rows: dict[int, Row] = {}
        self._size = 0
        self._batch: Any = None
        self._attached: list[Row] = []
        """Rows that keep a whole Arrow batch alive."""
        self._attached_bytes = 0

    def add(self, place: int, row: Row) -> None:
        """Hold a row; where there are too many, give up those with the last places."""
        self.rows[place] = row
        self._size += row.size
        if row.batch is not None:
            self._attached.append(row)
            if row.batch[0] is not self._batch:
                self._batch = row.batch[0]
                self._attached_bytes += self._batch.nbytes
            if self._attached_bytes > WINDOW_BYTES:
                self._let_go_of_batches(self._attached)
        if self._size > WINDOW_BYTES and len(self.rows) > 1:
            for last in sorted(self.rows, reverse=True):
                if self._size <= WINDOW_BYTES // 2 or len(self.rows) == 1:
                    break
                self._size -= self.rows.pop(last).size
                self.end = last
            self._let_go_of_batches(list(self.rows.values()))

    def _let_go_of_batches(self, rows: list[Row]) -> None:
        _detach(rows)
        self._attached, self._attached_bytes, self._batch = [], 0, None

    def in_order(self) -> Iterator[Row]:
        """Yield all rows."""
        _detach(list(self.rows.values()))
        yield from (self.rows[place] for place in range(self.end))


def _detach(rows: list[Row]) -> None:
    """Let go of the Arrow batches that rows came from: of each only the chosen rows are held, together in one."""
    by_schema: dict[Any, list[Row]] = {}
    for row in rows:
        if row.batch is not None:
            by_schema.setdefault(row.batch[0].schema, []).append(row)
    for schema, chosen in by_schema.items():
        import pyarrow as pa

        pieces, place = [], 0
        while place < len(chosen):
            batch = chosen[place].batch[0]  # type: ignore[index]
            same = [row.batch[1] for row in chosen[place:] if row.batch is not None and row.batch[0] is batch]
            pieces.append(batch.take(pa.array(same)))
            place += len(same)
        (together,) = pa.Table.from_batches(pieces, schema).combine_chunks().to_batches() or [None]
        for place, row in enumerate(chosen):
            row.batch = together, place

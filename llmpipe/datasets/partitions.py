"""Columns that stand in the names of a file's directories → columns of its rows, as pandas and Arrow read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from llmpipe.records import Row


def with_columns(rows: Iterator[Row], columns: dict[str, Any]) -> Iterator[Row]:
    """Yield rows with further columns; one that a row has itself stays as it is."""
    seen: Any = None
    widened: Any = None
    for row in rows:
        if row.error is None:
            new = {name: value for name, value in columns.items() if name not in row.values}
            if row.raw is not None and new:
                comma = b"," if row.values else b""
                row.raw = row.raw[:-1].rstrip() + comma + json.dumps(new, ensure_ascii=False).encode()[1:]
            row.values |= new
            if row.batch is not None:
                if row.batch[0] is not seen:
                    seen, widened = row.batch[0], _widened(row.batch[0], columns)
                row.batch = (widened, row.batch[1])
        yield row


def _widened(batch: Any, columns: dict[str, Any]) -> Any:
    import pyarrow as pa

    for name, value in columns.items():
        if name not in batch.schema.names:
            kind = pa.int64() if isinstance(value, int) else pa.string()
            batch = batch.append_column(name, pa.repeat(pa.scalar(value, kind), batch.num_rows))
    return batch

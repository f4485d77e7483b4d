"""Parquet: rows as Python values, each with the Arrow batch it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpipe.exceptions import DatasetError, MissingDependencyError
from llmpipe.records import Row

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1024


def read_parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file."""
    file, source = parquet_file(path), str(path)
    names = file.schema_arrow.names
    number = 0
    for batch in file.iter_batches(BATCH_ROWS):
        for i, cells in enumerate(zip(*map(_plain, batch.columns), strict=True)):
            number += 1
            values = dict(zip(names, cells, strict=True))
            bad = [name for name, cell in values.items() if isinstance(cell, _Unreadable)]
            if bad:
                raw = json.dumps(values, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
                yield Row(source, number, {}, raw, f"the column {bad[0]!r} cannot be read: {values[bad[0]].reason}")
            else:
                yield Row(source, number, values, batch=(batch, i))


@dataclass(frozen=True)
class _Unreadable:
    """A cell of which no value can be made."""

    reason: str

    def __str__(self) -> str:
        return f"unreadable: {self.reason}"


def _plain(column: pa.Array[Any]) -> list[Any]:
    """Return an Arrow column as Python values."""
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError):
        return [_plain_cell(cell) for cell in column]


def _plain_cell(cell: pa.Scalar[Any]) -> Any:
    """Return one value; as text where Python has none, such as dates after the year 9999."""
    try:
        return cell.as_py()
    except (ValueError, OverflowError) as error:
        try:
            return cell.cast("string").as_py()
        except Exception:  # text that is no UTF-8, lists of such dates
            return _Unreadable(" ".join(str(error).split()))


def parquet_file(path: Path) -> Any:
    """Open a Parquet file.

    Raises:
        DatasetError: it is damaged, or names a column twice.
        MissingDependencyError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "parquet", f"reading {path.name}") from error
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
    except Exception as error:
        raise DatasetError(f"{path} is not a readable Parquet file: {' '.join(str(error).split())}") from error
    if len(set(names)) != len(names):
        raise DatasetError(f"{path} names a column twice: {', '.join(names)}")
    return file


def fits(kind: pa.DataType, what: str) -> bool:
    """Say whether an Arrow type is one of those that `what` names; a column of nulls fits everywhere."""
    import pyarrow as pa

    types = pa.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    fits = types.is_null(kind) or types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    fits |= "numbers" in what and not types.is_nested(kind)
    fits |= "lists" in what and (types.is_list(kind) or types.is_large_list(kind))
    return fits or ("structs" in what and types.is_struct(kind))

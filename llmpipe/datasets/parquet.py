"""Parquet: rows as Python values, each with the Arrow batch it came from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpipe.config import DatasetConfig
from llmpipe.datasets.jsonl import DEFAULTS, parse_json, too_large
from llmpipe.exceptions import DatasetError, MissingDependencyError, one_line
from llmpipe.quoting import listed, quoted, repeated
from llmpipe.records import Row

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS, BATCH_BYTES = 64, 2**24
"""So many rows are read together, or rows of about so many bytes. More rows would hardly be faster, and how large they
are is only known once they are read: a long text that many have in common stands in the file once."""


def read_parquet(path: Path, config: DatasetConfig = DEFAULTS) -> Iterator[Row]:
    """Yield the rows of a Parquet file."""
    file, source = parquet_file(path), str(path)
    names = file.schema_arrow.names
    number = 0
    for batch in file.iter_batches(_batch_rows(file)):
        may_be_too_large = batch.nbytes > config.max_row_bytes
        for i, cells in enumerate(zip(*map(_plain, batch.columns), strict=True)):
            number += 1
            if may_be_too_large and batch.slice(i, 1).nbytes > config.max_row_bytes:
                yield too_large(source, number, b"", config)
                continue
            values = dict(zip(names, cells, strict=True))
            bad = [name for name, cell in values.items() if isinstance(cell, _Unreadable)]
            if bad:
                raw = json.dumps(values, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
                yield Row(
                    source, number, {}, raw, f"the column {quoted(bad[0])} cannot be read: {values[bad[0]].reason}"
                )
            else:
                yield Row(source, number, values, batch=(batch, i))


def _batch_rows(file: Any) -> int:
    """Return how many rows are read together: fewer of large ones."""
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    sizes = [group.total_byte_size // group.num_rows for group in groups if group.num_rows]
    # A text that many rows have in common stands in the file once, and in each row once it is read.
    sizes += [first.nbytes for first in islice(file.iter_batches(1), 1)]
    return min(BATCH_ROWS, max(1, BATCH_BYTES // int(max([1, *sizes]))))


@dataclass(frozen=True)
class _Unreadable:
    """A cell that cannot become a Python value."""

    reason: str

    def __str__(self) -> str:
        return f"unreadable: {self.reason}"


def _plain(column: pa.Array[Any]) -> list[Any]:
    """Return an Arrow column as Python values."""
    try:
        cells = list(column.to_pylist())
    except (ValueError, OverflowError):
        cells = [_plain_cell(cell) for cell in column]
    convert = _converter(column.type)
    return cells if convert is None else [_converted(cell, convert) for cell in cells]


def _plain_cell(cell: pa.Scalar[Any]) -> Any:
    """Return one value; as text where Python has none, such as dates after the year 9999."""
    try:
        return cell.as_py()
    except (ValueError, OverflowError) as error:
        try:
            return cell.cast("string").as_py()
        except Exception:  # text that is no UTF-8, lists of such dates
            return _Unreadable(one_line(error))


def _converted(cell: Any, convert: Callable[[Any], Any]) -> Any:
    return cell if cell is None or isinstance(cell, _Unreadable) else convert(cell)


def _converter(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """Return the function that decodes an Arrow type: JSON text to its value, a map with text keys to an object."""
    import pyarrow as pa

    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _parsed if kind.extension_name == "arrow.json" else _converter(kind.storage_type)
    if types.is_dictionary(kind):
        return _converter(kind.value_type)
    if types.is_map(kind):
        inner = _converter(kind.item_type) or _same
        return partial(_as_object, inner) if _is_text(kind.key_type) else None
    if _is_list(kind):
        inner_of_list = _converter(kind.value_type)
        return inner_of_list and (lambda cell: [_converted(item, inner_of_list) for item in cell])
    if types.is_struct(kind):
        of_fields = {field.name: convert for field in kind if (convert := _converter(field.type)) is not None}
        return (lambda cell: cell | {n: _converted(cell[n], c) for n, c in of_fields.items()}) if of_fields else None
    return None


def _same(value: Any) -> Any:
    return value


def _parsed(text: str) -> Any:
    try:
        return parse_json(text.encode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):  # then it is text, whatever its type says
        return text


def _as_object(convert: Callable[[Any], Any], pairs: list[tuple[str, Any]]) -> Any:
    found = {key: _converted(value, convert) for key, value in pairs}
    return found if len(found) == len(pairs) else pairs


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
        raise DatasetError(f"{path} is not a readable Parquet file: {one_line(error)}") from error
    if len(set(names)) != len(names):
        raise DatasetError(f"{path} names a column twice: {listed(repeated(names))}")
    return file


def fits(kind: pa.DataType, what: str) -> bool:
    """Say whether an Arrow type is one of those that `what` names; a column of nulls fits everywhere."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if isinstance(kind, pa.BaseExtensionType):
        if kind.extension_name == "arrow.json" and "JSON text" in what:
            return True
        kind = kind.storage_type
    fits = types.is_null(kind) or _is_text(kind)
    fits |= "numbers" in what and not types.is_nested(kind)
    fits |= "lists" in what and _is_list(kind)
    return fits or ("structs" in what and (types.is_struct(kind) or types.is_map(kind)))


def type_of(schema: pa.Schema, column: str) -> pa.DataType | None:
    """Return the type of a column, or of the field inside one that a path names; None where there is none."""
    import pyarrow as pa

    fields = {field.name: field.type for field in schema}
    if column in fields:
        return fields[column]
    for name, kind in fields.items():
        if column.startswith(f"{name}.") and pa.types.is_struct(kind):
            return type_of(pa.schema(list(kind)), column[len(name) + 1 :])
    return None


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    types = pa.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    types = pa.types
    plain = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(plain or types.is_list_view(kind) or types.is_large_list_view(kind))

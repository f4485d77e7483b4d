"""Parquet: typed columns; Arrow columns of the dataset are passed on as Arrow."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import IO, TYPE_CHECKING, Any

from llmpipe.outputs.arrow_types import AS_JSON, OF_THE_REST, ColumnTypes
from llmpipe.outputs.jsonl import dump_json
from llmpipe.outputs.layout import ID, Answered, Layout
from llmpipe.records import Row

if TYPE_CHECKING:
    import pyarrow as pa

GROUP_ROWS, GROUP_BYTES = 8192, 2**26
"""A row group is written when so many rows are held, or rows of so many bytes."""
_CELL_BYTES = 8
"""What a cell takes at least, be it null."""


class ParquetWriter:
    r"""Typed columns. Those of Parquet datasets are kept; those of text datasets are inferred from all rows.

    Half of a surrogate pair in an id or an answer, which only JSON can hold, is spelt out, as in `\ud800`.
    """

    needs_types = True

    def __init__(self, file: IO[bytes], layout: Layout, types: ColumnTypes | None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._pa = pa
        self._layout = layout
        assert types is not None
        self._own = types.schema()
        place = self._own.get_field_index(ID)
        kind = None if layout.adds_id else _id_type(self._own.field(place).type if place >= 0 else pa.string())
        self._fills_ids = kind is not None
        if kind is not None:
            others = [field for field in self._own if field.name != ID]
            others.insert(max(0, place), pa.field(ID, kind))
            self._own = pa.schema(others)
        self._names = frozenset(self._own.names)
        self._added = pa.schema([pa.field(name, kind) for name, kind in layout.types().items()])
        self._schema = pa.schema([*self._own, *self._added])
        self._least_bytes = _CELL_BYTES * sum(_leaves(field.type) for field in self._schema)
        self._writer = pq.ParquetWriter(file, self._schema, compression="zstd")
        self._held: list[Answered] = []
        self._held_bytes = 0

    def write(self, answered: Answered) -> None:
        """Append one output row."""
        self._held.append(answered)
        completion = answered.completion
        self._held_bytes += self._least_bytes + answered.row.size + len(completion.text or completion.error or "")
        if len(self._held) >= GROUP_ROWS or self._held_bytes >= GROUP_BYTES:
            self._flush()

    def finish(self) -> None:
        """Write the last group and the footer."""
        try:
            self._flush()
        finally:
            self._writer.close()

    def _flush(self) -> None:
        if not self._held:
            return
        added = zip(*(self._layout.values(row, completion) for row, completion in self._held), strict=True)
        arrays = [self._array(values, field.type) for values, field in zip(added, self._added, strict=True)]
        own = self._own_columns([row for row, _ in self._held])
        self._writer.write_table(self._pa.Table.from_arrays([*own, *arrays], schema=self._schema))
        self._held.clear()
        self._held_bytes = 0

    def _own_columns(self, rows: list[Row]) -> list[Any]:
        groups = groupby(rows, key=lambda row: id(row.batch[0]) if row.batch else None)
        tables = [self._own_table(list(group)) for _, group in groups]
        return list(self._pa.concat_tables(tables).columns)

    def _own_table(self, rows: list[Row]) -> pa.Table:
        """Return the own columns of rows that come from one Arrow batch, or from none."""
        places = [row.batch for row in rows if row.batch is not None]
        arrow = places[0][0].take(self._pa.array([place for _, place in places])) if places else None
        columns = [self._own_column(field, rows, arrow) for field in self._own]
        return self._pa.Table.from_arrays(columns, schema=self._own)

    def _own_column(self, field: pa.Field[Any], rows: list[Row], arrow: pa.RecordBatch | None) -> Any:
        if field.name == ID and self._fills_ids:
            return self._array([str(row.id(self._layout.id_column)) for row in rows], field.type)
        if (field.metadata or {}).items() >= OF_THE_REST.items():
            others = [{name: row.values[name] for name in row.values if name not in self._names} for row in rows]
            return self._pa.array([dump_json(other).decode() if other else None for other in others], field.type)
        as_json = field.metadata == AS_JSON
        if arrow is not None and field.name in arrow.schema.names and not as_json:
            column = arrow.column(field.name)
            if column.type == field.type:
                return column
        values = [row.values.get(field.name) for row in rows]
        if as_json:
            values = [None if value is None else dump_json(value).decode() for value in values]
        return self._pa.array(values, field.type)

    def _array(self, values: Iterable[Any], kind: pa.DataType) -> Any:
        values = list(values)
        try:
            return self._pa.array(values, kind)
        except UnicodeEncodeError:
            spelt = [value and value.encode("utf-8", "backslashreplace").decode() for value in values]
            return self._pa.array(spelt, kind)


def _leaves(kind: pa.DataType) -> int:
    """Return how many columns of plain values an Arrow type makes in a file."""
    return sum(_leaves(kind.field(i).type) for i in range(kind.num_fields)) or 1


def _id_type(own: pa.DataType) -> pa.DataType | None:
    """Return the text type in which ids are written, those by position too; None where the column stays as it is.

    Integers, booleans and nested values stay; floats, UUIDs and dates become text, as ids are written in JSON.
    """
    import pyarrow as pa

    types = pa.types
    if types.is_integer(own) or types.is_boolean(own) or types.is_nested(own):
        return None
    return own if types.is_large_string(own) or types.is_string_view(own) else pa.string()

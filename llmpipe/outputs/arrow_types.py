"""Values of text rows → the Arrow types that hold them exactly. Knows nothing of files or completions."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from llmpipe.exceptions import MissingDependencyError
from llmpipe.records import Row, is_utf8

if TYPE_CHECKING:
    import pyarrow as pa

AS_JSON = {b"llmpipe": b"json"}
"""Metadata of a Parquet column whose values are JSON text."""
MAX_TYPED_LEVELS, MAX_TYPED_FIELDS = 16, 256
"""Values nested deeper, and objects with more different keys, are kept as JSON text."""

Kind = Any
"""What the JSON values of a column have in common: a key of `_ARROW`, `[kind of the items]`, or `{key: kind}`."""

_ARROW = {"null": "null", "bool": "bool", "exact": "int64", "int": "int64", "float": "float64", "str": "string"}
_WIDER = {frozenset({"exact", "int"}): "int", frozenset({"exact", "float"}): "float"}
_SCALARS = {type(None): "null", bool: "bool", float: "float"}


class ColumnTypes:
    """Looks at every row, and then knows the Arrow schema that holds their own columns exactly.

    Parquet rows have their types. A column of text rows that fits no Arrow type (numbers and text mixed, integers
    beyond 64 bits, empty objects) is kept as JSON text, and its field says so in its metadata.

    Raises:
        MissingDependencyError: pyarrow is not installed; said before any work is done.
    """

    def __init__(self) -> None:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError("pyarrow", "parquet", "output=parquet") from error
        self._typed: dict[str, Any] = {}
        self._kinds: dict[str, Kind] = {}
        self._last_batch: Any = None

    def add(self, row: Row) -> None:
        """Look at one row."""
        if row.batch is None:
            for name, value in row.values.items():
                kind = self._kinds.get(name, "null")
                if kind != "str" or type(value) is not str or not value.isascii():  # nearly always it is no news
                    self._kinds[name] = _wider(kind, _kind_of(value))
        elif row.batch[0] is not self._last_batch:
            import pyarrow as pa

            self._last_batch = row.batch[0]
            for field in self._last_batch.schema:
                self._typed[field.name] = _unified(self._typed.get(field.name, pa.null()), field.type)

    def schema(self) -> pa.Schema:
        """Return the schema of all rows seen."""
        import pyarrow as pa

        typed = dict(self._typed)
        for name, kind in self._kinds.items():
            typed[name] = _unified(typed.get(name, pa.null()), _arrow_type(kind))
        return pa.schema([_field(name, kind) for name, kind in typed.items()])


def _field(name: str, kind: Any) -> pa.Field[Any]:
    import pyarrow as pa

    if kind is None:
        return pa.field(name, pa.string(), metadata=AS_JSON)
    return pa.field(name, pa.string() if pa.types.is_null(kind) else kind)


def _kind_of(value: Any, levels: int = MAX_TYPED_LEVELS) -> Kind:
    """Return the kind of one JSON value; `json` is what no Arrow type holds."""
    if isinstance(value, str):
        return "str" if is_utf8(value) else "json"
    if type(value) is int:
        return "exact" if abs(value) <= 2**53 else "int" if -(2**63) <= value < 2**63 else "json"
    if isinstance(value, (list, dict)) and not levels:
        return "json"
    if isinstance(value, list):
        return [functools.reduce(_wider, (_kind_of(item, levels - 1) for item in value), "null")]
    if isinstance(value, dict):
        fields = {name: _kind_of(inner, levels - 1) for name, inner in value.items()}
        return fields if len(fields) <= MAX_TYPED_FIELDS else "json"
    return _SCALARS.get(type(value), "json")


def _wider(one: Kind, other: Kind) -> Kind:
    """Return the kind that holds both; integers that a float would round do not become floats."""
    if one == other or other == "null":
        return one
    if one == "null":
        return other
    if isinstance(one, dict) and isinstance(other, dict):
        both = one | {name: _wider(one.get(name, "null"), kind) for name, kind in other.items()}
        return both if len(both) <= MAX_TYPED_FIELDS else "json"  # now, or keys that are ids would make it ever slower
    if isinstance(one, list) and isinstance(other, list):
        return [_wider(one[0], other[0])]
    both_plain = isinstance(one, str) and isinstance(other, str)
    return _WIDER.get(frozenset({one, other}), "json") if both_plain else "json"


def _arrow_type(kind: Kind) -> Any:
    """Return the Arrow type of a kind, or None where there is none that Parquet can hold."""
    import pyarrow as pa

    if isinstance(kind, list):
        items = _arrow_type(kind[0])
        return items and pa.list_(items)
    if isinstance(kind, dict):
        fields = {name: _arrow_type(inner) for name, inner in kind.items() if is_utf8(name)}
        storable = len(fields) == len(kind) and fields and None not in fields.values()
        return pa.struct(list(fields.items())) if storable else None
    return pa.type_for_alias(_ARROW[kind]) if kind in _ARROW else None


def _unified(one: Any, other: Any) -> Any:
    """Return the Arrow type that holds the values of both, or None where there is none."""
    import pyarrow as pa

    if one is None or other is None:
        return None
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    one, other = (kind.value_type if pa.types.is_dictionary(kind) else kind for kind in (one, other))
    for is_kind in (pa.types.is_integer, pa.types.is_unsigned_integer, pa.types.is_binary):
        if is_kind(one) != is_kind(other):
            return None  # Arrow would round or guess
    try:
        schemas = [pa.schema([("", one)]), pa.schema([("", other)])]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return None

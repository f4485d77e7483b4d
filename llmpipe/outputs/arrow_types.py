"""Values of text rows → the Arrow types that hold them exactly. Knows nothing of files or completions."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from llmpipe.exceptions import MissingDependencyError
from llmpipe.quoting import listed
from llmpipe.records import Row
from llmpipe.text import is_utf8

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

AS_JSON = {b"llmpipe": b"json"}
"""Metadata of a Parquet column whose values are JSON text."""
OF_THE_REST = {b"llmpipe_columns": b"other"}
"""Metadata of the column that holds other columns."""
MAX_TYPED_LEVELS = 16
"""Values nested deeper are kept as JSON text."""
MAX_FIELDS = 1000
"""Most fields of a schema, those inside of objects too, unless rows have as many columns each. Beyond them, the columns
whose objects have the most different keys are kept as JSON text, and then the columns that come last, together in one:
else keys that are ids would each cost a cell in every row."""
REST = "other_columns"
"""What the column is called that holds the columns that come last, as JSON objects."""

Kind = Any
"""What the JSON values of a column have in common: a key of `_ARROW`, `[kind of the items]`, or `{key: kind}`."""

# `exact` are the integers that a float holds exactly: with floats they become floats, and larger ones, `int`, do not.
_ARROW = {"null": "null", "bool": "bool", "exact": "int64", "int": "int64", "float": "float64", "str": "string"}
_WIDER = {frozenset({"exact", "int"}): "int", frozenset({"exact", "float"}): "float"}
_CROWDED = "crowded"
"""The kind of objects that together have too many keys."""
_SCALARS = {type(None): "null", bool: "bool", float: "float"}


class ColumnTypes:
    """Looks at every row, and then knows the Arrow schema that holds their own columns exactly.

    Parquet rows have their types. A column of text rows that fits no Arrow type (numbers and text mixed, integers
    beyond 64 bits, empty objects, objects with ever other keys) is kept as JSON text, and its field says so in its
    metadata. What is held does not grow with the number of rows, nor of different keys.

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
        self._sizes: dict[str, int] = {}
        """How many fields each kind has."""
        self._size, self._room = 0, MAX_FIELDS
        """Fields of all kinds together, and most that they may be."""
        self._overfull = False
        """Whether there were columns beyond those that are typed."""
        self._last_batch: Any = None

    def add(self, row: Row) -> None:
        """Look at one row."""
        if row.batch is None:
            self._room = max(self._room, 2 * len(row.values))
            for name, value in row.values.items():
                kind = self._kinds.get(name)
                if kind != "str" or type(value) is not str or not value.isascii():  # nearly always it is no news
                    if kind is None and len(self._kinds) >= self._room:
                        self._overfull = True
                    elif (wider := _wider("null" if kind is None else kind, _kind_of(value))) is not kind:
                        self._widen(name, wider)
        elif row.batch[0] is not self._last_batch:
            import pyarrow as pa

            self._last_batch = row.batch[0]
            self._room = max(self._room, 2 * len(self._last_batch.schema))
            for field in self._last_batch.schema:
                if field.name in self._typed or len(self._typed) < self._room:
                    self._typed[field.name] = _unified(self._typed.get(field.name, pa.null()), field.type)
                else:
                    self._overfull = True

    def _widen(self, name: str, kind: Kind) -> None:
        """Note the kind of a column; where there is no room for it, those with the most keys are to be JSON text."""
        # JSON text is one field. So while all are too many, the column that has the most becomes that, this one or
        # another, until they fit or each has but one.
        while True:
            size = _fields(kind)
            self._size += size - self._sizes.get(name, 0)
            self._kinds[name], self._sizes[name] = kind, size
            widest = max(self._sizes, key=self._sizes.__getitem__) if self._size > self._room else name
            if self._size <= self._room or self._sizes[widest] == 1:
                return
            name, kind = widest, _CROWDED

    def schema(self) -> pa.Schema:
        """Return the schema of all rows seen, and say what is kept as JSON text for its many keys."""
        import pyarrow as pa

        typed = dict(self._typed)
        for name, kind in self._kinds.items():
            typed[name] = _unified(typed.get(name, pa.null()), _arrow_type(kind))
        if crowded := [name for name, kind in self._kinds.items() if _is_crowded(kind)]:
            log.info("kept as JSON text, as their objects have ever other keys: the columns %s", listed(crowded))
        fields = [_field(name, kind) for name, kind in typed.items()]
        if self._overfull:
            rest = REST
            while rest in typed:
                rest += "_"
            log.info("kept as JSON text in the column %r: the columns beyond the first %d", rest, len(typed))
            fields.append(pa.field(rest, pa.string(), metadata=AS_JSON | OF_THE_REST))
        return pa.schema(fields)


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
        return fields if len(fields) <= MAX_FIELDS else _CROWDED
    return _SCALARS.get(type(value), "json")


def _wider(one: Kind, other: Kind) -> Kind:
    """Return the kind that holds both; integers that a float would round do not become floats."""
    if one == other or other == "null":
        return one
    if one == "null":
        return other
    if _CROWDED in (one, other):
        return _CROWDED
    if isinstance(one, dict) and isinstance(other, dict):
        known = ((name, one.get(name), kind) for name, kind in other.items())
        wider = ((name, old, kind if old is None else _wider(old, kind)) for name, old, kind in known)
        if not (news := {name: kind for name, old, kind in wider if kind is not old}):
            return one
        both = one | news
        return both if len(both) <= MAX_FIELDS else _CROWDED  # now, or keys that are ids would make it ever slower
    if isinstance(one, list) and isinstance(other, list):
        items = _wider(one[0], other[0])
        return one if items is one[0] else [items]
    both_plain = isinstance(one, str) and isinstance(other, str)
    return _WIDER.get(frozenset({one, other}), "json") if both_plain else "json"


def _fields(kind: Kind) -> int:
    """Return how many fields a kind makes."""
    if isinstance(kind, list):
        return _fields(kind[0])
    return max(1, sum(map(_fields, kind.values()))) if isinstance(kind, dict) else 1


def _is_crowded(kind: Kind) -> bool:
    inner = kind if isinstance(kind, list) else kind.values() if isinstance(kind, dict) else ()
    return kind == _CROWDED or any(map(_is_crowded, inner))


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

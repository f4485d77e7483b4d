"""JSONL: text rows are spliced as they stand, with the new columns at the end."""

from __future__ import annotations

import base64
import json
from typing import IO, Any

import orjson

from llmpipe.outputs.layout import ID, Answered, Layout


class JsonlWriter:
    """One JSON object per line."""

    needs_types = False

    def __init__(self, file: IO[bytes], layout: Layout, types: object = None) -> None:
        self._file = file
        self._layout = layout
        self._names = list(layout.types())

    def write(self, answered: Answered) -> None:
        """Append one output row: the row as it stands in its file, with the new columns spliced in at the end."""
        row, completion = answered
        added = dict(zip(self._names, self._layout.values(row, completion), strict=True))
        own = row.values.get(ID)
        if not (self._layout.adds_id or type(own) in (str, int) or isinstance(own, (list, dict))):
            added = {ID: row.id(self._layout.id_column), **added}
        if row.error is not None:
            own = b"{}"
        elif row.raw is None or (ID in added and ID in row.values):
            own = dump_json({name: value for name, value in row.values.items() if name not in added})
        else:
            own = row.raw
        comma = b"," if own[1:-1].strip() else b""
        self._file.write(own[:-1] + comma + _dump_added(added)[1:] + b"\n")

    def finish(self) -> None:
        """Nothing is held."""


def dump_json(values: Any) -> bytes:
    """Write values as one line of JSON, exactly: integers of any size, NaN, Infinity; other types as text."""
    options: dict[str, Any] = {"separators": (",", ":"), "default": _json_default}
    try:
        return json.dumps(values, ensure_ascii=False, **options).encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can hold
        return json.dumps(values, **options).encode("utf-8")


def _dump_added(values: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(values)  # ten times faster, and exact for what llmpipe itself adds
    except TypeError:  # half of a surrogate pair in an answer or an id
        return dump_json(values)


def _json_default(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return str(value)

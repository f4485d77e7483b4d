"""The tables of a ledger and the form of their values; each value has a checksum over itself and its key."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any
from zlib import crc32

import orjson

from llmpipe.ledger.faults import damaged
from llmpipe.records import Completion

FILE = "ledger.sqlite"
VERSION = 4
"""Of the tables and of what is in them. A completion's values are kept by their place, so that a field of `Completion`
that comes, goes or moves makes another version; so does another way to derive a row's seed."""
TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE completions (row INTEGER, sample INTEGER, data BLOB NOT NULL, crc INTEGER NOT NULL, "
    "PRIMARY KEY (row, sample)) WITHOUT ROWID",
    f"PRAGMA user_version = {VERSION}",
)
NO_TEXT = b"[null,"
"""What the data of a completion begins with where it has no text, as only an error has none."""
_values = attrgetter(*(f.name for f in fields(Completion)[2:] if f.name != "scores"))
"""The values of a completion that are kept as its data, in the order of its fields; row and sample have columns."""


def packed(completion: Completion) -> bytes:
    """Return the data of a completion."""
    values = _values(completion)
    try:
        return orjson.dumps(values)
    except TypeError:  # half of a surrogate pair, which only an escape can hold
        return json.dumps(values).encode()


def unpacked(row: int, sample: int, data: bytes) -> Completion:
    """Return the completion that stands in a row of the table."""
    try:
        return Completion(row, sample, *orjson.loads(data))
    except ValueError:  # an escape that orjson refuses
        return Completion(row, sample, *json.loads(data))


def checksum(data: bytes, key: bytes) -> int:
    """Return a checksum over a value and its key, so that a value that moves to another key is noticed."""
    return crc32(data, crc32(key))


def key_of(row: int, sample: int) -> bytes:
    """Return the key that a completion stands under."""
    return b"%d %d" % (row, sample)


def note(db: sqlite3.Connection, facts: Mapping[str, Any]) -> None:
    """Write facts, each over what was noted under its key."""
    texts = ((key, json.dumps(value)) for key, value in facts.items())
    rows = [(key, text, checksum(text.encode(), key.encode())) for key, text in texts]
    db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", rows)


def noted(path: Path, db: sqlite3.Connection, key: str) -> Any:
    """Return a fact, or None.

    Raises:
        LedgerError: it is not as it was written.
    """
    found = db.execute("SELECT value, crc FROM meta WHERE key = ?", (key,)).fetchone()
    if found is None:
        return None
    value, crc = found
    if not isinstance(value, str) or crc != checksum(value.encode(), key.encode()):
        raise damaged(path, f"{key} is not as it was written")
    return json.loads(value)

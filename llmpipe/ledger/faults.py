"""What SQLite says is wrong with a ledger → one line that says what to do."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmpipe.exceptions import LedgerError

_OF_DAMAGE = {
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_MISMATCH,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_SCHEMA,
}
"""Error codes for a file that is not SQLite's, is damaged, or has other tables; after all others the file is whole."""


@contextmanager
def faults_named(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into one line; only a damaged file is to be moved away, not one on a full disk."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        # Without a code an OperationalError is the sqlite3 module's own: a text that cannot be decoded.
        if code is None and isinstance(error, sqlite3.OperationalError) or (code or 0) & 0xFF in _OF_DAMAGE:
            raise damaged(path, str(error)) from error
        raise LedgerError(f"cannot read or write {path}: {error}; what was committed before is safe") from error
    except UnicodeDecodeError as error:  # SQLite quotes what it cannot read, and Python cannot read the quotation
        raise damaged(path, "what should be a table is no text") from error


def damaged(path: Path, what: str) -> LedgerError:
    """Return what is to be raised of a ledger that is not what was written."""
    return LedgerError(f"{path} is damaged or not a ledger ({what}); move it away to start again")

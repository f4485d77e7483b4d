"""Durable progress: which rows are done, and what came of them. One SQLite file in the run directory.

A completion counts as done once it is committed here; commits are made in small groups, each synced to disk. A process
killed at any instant loses at most the group that was not committed, and starting again does those rows.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Self

import filelock

from llmpipe.exceptions import LedgerError
from llmpipe.records import Completion

FILE = "ledger.sqlite"
VERSION = 1
COMMIT_EVERY_S = 0.5
COMMIT_EVERY_ROWS = 2000
_FIELDS = {f.name for f in fields(Completion)}


class Ledger:
    """The progress of one run; open in one process at a time.

    Args:
        directory: The run directory; made if it is not there.
        fingerprint: What was asked, as nested plain values. A ledger made with another one is refused.

    Raises:
        LedgerError: another process works on the directory, the file is damaged, or it belongs to another run.
    """

    def __init__(self, directory: Path, fingerprint: dict[str, Any]) -> None:
        self.path = directory / FILE
        self.noted = 0
        """Completions added since the ledger was opened."""
        self._pending: list[tuple[int, int, bytes]] = []
        self._committed_at = time.monotonic()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            # The lock is the operating system's, so that it ends with the process that holds it.
            self._lock = filelock.FileLock(directory / ".lock", timeout=0)
            self._lock.acquire()
        except filelock.Timeout as error:
            raise LedgerError(
                f"{directory} is in use by another process: wait for it, or choose another hydra.run.dir"
            ) from error
        except OSError as error:
            raise LedgerError(f"cannot write to the run directory {directory}: {error.strerror or error}") from error
        try:
            self._open(fingerprint)
        except (sqlite3.Error, ValueError) as error:
            self.close()
            raise LedgerError(
                f"{self.path} is damaged or not a ledger ({error}); move it away to start again"
            ) from error
        except BaseException:
            self.close()
            raise

    def _open(self, fingerprint: dict[str, Any]) -> None:
        self._db = sqlite3.connect(self.path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            what = " ".join(found.split())
            raise LedgerError(f"{self.path} is damaged ({what}); move it away to start again")
        self._db.execute("CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS completions (row INTEGER, sample INTEGER, data BLOB NOT NULL, "
            "PRIMARY KEY (row, sample)) WITHOUT ROWID"
        )
        known = self.get("fingerprint")
        if known is None:
            self.set(version=VERSION, fingerprint=fingerprint)
        elif self.get("version") != VERSION:
            raise LedgerError(f"{self.path} was written by another version of llmpipe; finish it with that one")
        elif known != json.loads(json.dumps(fingerprint)):
            changes = "; ".join(differences(known, fingerprint))
            raise LedgerError(
                f"{self.path.parent} holds a run of another configuration: {changes}. Use another hydra.run.dir"
            )

    def add(self, completions: Iterable[Completion]) -> None:
        """Note completions; they are committed within half a second of further work, or by `commit`."""
        for completion in completions:
            self.noted += 1
            data = {name: value for name, value in asdict(completion).items() if value is not None}
            del data["request_id"], data["sample"]
            self._pending.append((completion.request_id, completion.sample, json.dumps(data).encode()))
        if len(self._pending) >= COMMIT_EVERY_ROWS or time.monotonic() - self._committed_at >= COMMIT_EVERY_S:
            self.commit()

    def commit(self) -> None:
        """Make everything that was added durable.

        Raises:
            LedgerError: the disk is full or cannot be written; what was committed before is safe.
        """
        self._committed_at = time.monotonic()
        if not self._pending:
            return
        self._write("INSERT OR REPLACE INTO completions VALUES (?, ?, ?)", self._pending)
        self._pending.clear()

    def done(self, first: int, last: int) -> dict[int, frozenset[int]]:
        """Return the samples that are done of each row in [first, last]; rows without any are left out."""
        self.commit()
        found: dict[int, set[int]] = {}
        for row, sample in self._query("SELECT row, sample FROM completions WHERE row BETWEEN ? AND ?", first, last):
            found.setdefault(row, set()).add(sample)
        return {row: frozenset(samples) for row, samples in found.items()}

    def completions(self) -> Iterator[Completion]:
        """Yield every completion by row and sample.

        Raises:
            LedgerError: the file is damaged.
        """
        self.commit()
        try:
            for row, sample, data in self._db.execute("SELECT row, sample, data FROM completions ORDER BY row, sample"):
                values = {name: value for name, value in json.loads(data).items() if name in _FIELDS}
                yield Completion(row, sample, **{"text": None, **values})
        except (sqlite3.Error, ValueError) as error:
            raise LedgerError(f"{self.path} is damaged: {error}") from error

    def count(self) -> int:
        """Return how many completions are noted."""
        self.commit()
        return int(self._query("SELECT count(*) FROM completions")[0][0])

    def rows(self) -> int:
        """Return how many rows have at least one completion."""
        self.commit()
        return int(self._query("SELECT count(DISTINCT row) FROM completions")[0][0])

    def most_samples(self) -> int:
        """Return the largest number of samples that a row has."""
        self.commit()
        return int(self._query("SELECT coalesce(max(sample), -1) FROM completions")[0][0]) + 1

    def get(self, key: str) -> Any:
        """Return a noted fact about the run, or None."""
        found = self._query("SELECT value FROM meta WHERE key = ?", key)
        return json.loads(found[0][0]) if found else None

    def set(self, **facts: Any) -> None:
        """Note facts about the run, durably and all together.

        Raises:
            LedgerError: the disk is full or cannot be written.
        """
        self._write("INSERT OR REPLACE INTO meta VALUES (?, ?)", [(k, json.dumps(v)) for k, v in facts.items()])

    def close(self) -> None:
        """Commit nothing, close the file, let others at the directory."""
        if hasattr(self, "_db"):
            self._db.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _query(self, sql: str, *values: Any) -> list[Any]:
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise LedgerError(f"{self.path} is damaged or cannot be read: {error}") from error

    def _write(self, sql: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Write rows in one transaction, synced to disk."""
        try:
            with _Transaction(self._db):
                self._db.executemany(sql, rows)
        except sqlite3.Error as error:
            raise LedgerError(f"cannot write to {self.path}: {error}; what was committed before is safe") from error


def saved_arguments(directory: Path) -> list[str]:
    """Return the command line that a run was started with; waits for no lock and changes nothing.

    Raises:
        LedgerError: the directory holds no run, or a damaged one.
    """
    path = directory / FILE
    if not path.is_file():
        raise LedgerError(f"{directory} is no run directory: there is no {FILE} in it")
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
            found = db.execute("SELECT value FROM meta WHERE key = 'arguments'").fetchone()
        return [] if found is None else [str(argument) for argument in json.loads(found[0])]
    except (sqlite3.Error, ValueError) as error:
        raise LedgerError(f"{path} is damaged or not a ledger ({error})") from error


class _Transaction:
    """BEGIN … COMMIT, or ROLLBACK where something failed."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            self._db.execute("COMMIT" if kind is None else "ROLLBACK")
        except sqlite3.Error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if kind is None:
                raise


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Say, for two nested plain values, what was and what is, as `sampling.temperature was 0.0, is 0.7`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield f"{path} was {old!r}, is {new!r}"

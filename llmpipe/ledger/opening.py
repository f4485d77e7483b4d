"""Who may have a run directory, and how the ledger in it comes to be, and is opened."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from llmpipe.exceptions import LedgerError
from llmpipe.ledger.faults import damaged, faults_named
from llmpipe.ledger.format import FILE, TABLES, VERSION, note
from llmpipe.system.files import new_files, seal


def locked(directory: Path, lock: filelock.BaseFileLock | None = None) -> filelock.BaseFileLock:
    """Lock a run directory, which is made if it is not there, against other processes.

    Args:
        directory: The run directory.
        lock: Its lock, where this process holds it already; each time it is acquired, it has to be released.

    Raises:
        LedgerError: another process has it, or the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # The lock is the operating system's, so that it ends with the process that holds it.
        lock = lock or filelock.FileLock(directory / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout as error:
        raise LedgerError(
            f"{directory} is in use by another process: wait for it, or choose another hydra.run.dir"
        ) from error
    except OSError as error:
        raise LedgerError(f"cannot write to the run directory {directory}: {error.strerror or error}") from error
    return lock


@contextmanager
def held(directory: Path) -> Iterator[filelock.BaseFileLock]:
    """Hold the lock of a run directory; what was made for it goes with it where no run has begun.

    Raises:
        LedgerError: as `locked`.
    """
    made = not directory.exists()
    lock = locked(directory)
    try:
        yield lock
    finally:
        if not os.path.lexists(directory / FILE):
            with suppress(OSError):  # unless the directory holds something else
                os.unlink(lock.lock_file)
                if made:
                    directory.rmdir()
        lock.release()


def begun(directory: Path) -> bool:
    """Say whether a run has begun in a directory. A ledger without tables is what a killed beginning may have left.

    Raises:
        LedgerError: the file is not a ledger, or is damaged.
    """
    path = directory / FILE
    if not os.path.lexists(path):
        return False
    with faults_named(path), closing(_read_only(path)) as db:
        return db.execute("SELECT 1 FROM sqlite_schema").fetchone() is not None


def opened(directory: Path) -> sqlite3.Connection:
    """Open the ledger of a run that has begun, for reading; waits for no lock and changes nothing.

    Raises:
        LedgerError: there is none.
    """
    if not begun(directory):
        raise LedgerError(f"{directory} is no run directory: no run has begun in it; give the run's own command")
    with faults_named(directory / FILE):
        return _read_only(directory / FILE)


def _read_only(path: Path) -> sqlite3.Connection:
    """Open a ledger for reading; beside one at rest, SQLite would leave files of its own."""
    if not path.is_file():
        raise damaged(path, "it is no file")
    mode = "mode=ro" if has_journal(path) else "immutable=1"
    return sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True, isolation_level=None)


def has_journal(path: Path) -> bool:
    """Say whether a run is at work on a ledger, or was killed at it."""
    return path.with_name(f"{FILE}-wal").exists()


def last_change(path: Path) -> int:
    """Return when a file was last written to, in ns; 0 where it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def create(path: Path, facts: Mapping[str, Any]) -> None:
    """Make a ledger that holds these facts; it has its name when it is complete and durable, and not before.

    Raises:
        LLMError: it cannot be written.
    """
    with new_files(path.parent, [FILE]) as files:
        for journal in ("-journal", "-wal", "-shm"):  # of a ledger that is gone: SQLite would take it for this one's
            path.with_name(f"{FILE}{journal}").unlink(missing_ok=True)
        with faults_named(path), closing(sqlite3.connect(files[FILE].name, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode=OFF")  # what is not complete is thrown away, and `seal` syncs what is
            db.execute("PRAGMA synchronous=OFF")
            for statement in TABLES:
                db.execute(statement)
            note(db, facts)
        seal(files)


def check_version(path: Path, db: sqlite3.Connection) -> None:
    """Refuse a ledger with other tables.

    Raises:
        LedgerError: it has.
    """
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version != VERSION:
        raise LedgerError(f"{path} was written by another version of llmpipe; finish it with that one")

"""Durable progress: which rows are done, and what came of them. One SQLite file in the run directory.

A completion counts as done once it is committed here; commits are made in small groups, each synced to disk, by a
thread of the ledger's own: they wait for nothing that the model does, nor it for them. A process killed at any instant
loses at most the group that was not committed, and starting again does those rows.

A ledger appears whole, with all that says which run it is of: where it is not, no run has begun.

SQLite notices damage to its own structure only, so every completion and fact carries a checksum of what it says.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any, Self
from zlib import crc32

import filelock
import orjson

from llmpipe.exceptions import LedgerError
from llmpipe.files import new_files, seal
from llmpipe.records import Completion
from llmpipe.redaction import change

FILE = "ledger.sqlite"
VERSION = 4
"""Of the tables and of what is in them. A completion's values are kept by their place, so that a field of `Completion`
that comes, goes or moves makes another version; so does another way to derive a row's seed."""
COMMIT_EVERY_S = 0.5
COMMIT_EVERY_ROWS = 2000
"""So many wait for no half second; who adds them commits them, so that nobody adds faster than the disk can take."""
COMMIT_AT_ONCE_BYTES = 2**16
"""An answer of more waits for nobody, so that few of them are held."""
_BESIDE_BYTES = 1000
"""More than what SQLite keeps beside an answer, which counts towards the largest size that it takes."""
_values = attrgetter(*(f.name for f in fields(Completion)[2:] if f.name != "scores"))
"""The values of a completion as they are kept, in the order of its fields; row and sample are beside them."""
_NO_TEXT = b"[null,"
"""What the values of a completion begin with where they begin with no text, as only those of an error do."""
_TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE completions (row INTEGER, sample INTEGER, data BLOB NOT NULL, crc INTEGER NOT NULL, "
    "PRIMARY KEY (row, sample)) WITHOUT ROWID",
    f"PRAGMA user_version = {VERSION}",
)
_OF_DAMAGE = {
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_MISMATCH,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_SCHEMA,
}
"""What SQLite says of a file that is none of its own, or has other tables; all else leaves the file as it was."""


class Ledger:
    """The progress of one run; open in one process at a time.

    Args:
        directory: The run directory; made if it is not there.
        fingerprint: What was asked, as nested plain values. A ledger made with another one is refused.
        remark: What else is to be said of the difference then.
        facts: What else is noted of a run that begins.
        lock: That of the directory, where the caller holds it; see `locked`.

    Raises:
        LedgerError: another process works on the directory, the file is damaged, or it belongs to another run.
        LLMError: the directory cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        fingerprint: dict[str, Any],
        remark: str | None = None,
        facts: Mapping[str, Any] | None = None,
        lock: filelock.BaseFileLock | None = None,
    ) -> None:
        self._remark = remark
        self.path = directory / FILE
        self.noted = 0
        """Completions added since the ledger was opened."""
        self.alongside: Callable[[], dict[str, Any]] = dict
        """Gives the facts that each commit notes with its completions, from whichever thread makes it."""
        self.before_commit: Callable[[], None] = lambda: None
        """Called by each commit, from whichever thread makes it; what it raises keeps its completions out."""
        self._pending: list[tuple[int, int, bytes, int]] = []
        self._turn = threading.RLock()
        """Held by the thread that uses the connection."""
        self._closing = threading.Event()
        self._committer: threading.Thread | None = None
        self._fault: Exception | None = None
        """Why the thread commits no more."""
        self._lock = locked(directory, lock)
        try:
            if not begun(directory):
                _create(self.path, {"fingerprint": fingerprint, **(facts or {})})
            with _faults_named(self.path):
                self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
                self._check(fingerprint)
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
            self._file = _identity(self.path)
        except BaseException:
            self.close()
            raise

    def _check(self, fingerprint: dict[str, Any] | None) -> None:
        """Refuse a ledger that is damaged or belongs to another run; without a fingerprint any run will do."""
        _check_version(self.path, self._db)
        (found,) = self._query("PRAGMA quick_check(1)")[0]
        if found != "ok":
            raise _damaged(self.path, " ".join(found.split()))
        for _ in self._verified():  # now, and not when hours of work have been added
            pass
        known = self.get("fingerprint")
        if known is None:
            raise _damaged(self.path, "the fingerprint is gone")
        if fingerprint is not None and known != json.loads(json.dumps(fingerprint)):
            changes = "; ".join([*differences(known, fingerprint), *([self._remark] if self._remark else [])])
            raise LedgerError(
                f"{self.path.parent} holds a run of another configuration: {changes}. Drop the difference "
                f"to go on with it, or use another hydra.run.dir"
            )

    def add(self, completions: Iterable[Completion]) -> None:
        """Note completions; they are committed within half a second, or by `commit`.

        One that is larger than what SQLite holds becomes an error.

        Raises:
            LedgerError: as `check`.
        """
        self.check()
        most, at_once = self._db.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) - _BESIDE_BYTES, False
        for completion in completions:
            self.noted += 1
            row, sample = completion.request_id, completion.sample
            data = _dump(_values(completion))
            if len(data) > most:
                completion.text = completion.first_token_s = None
                completion.finish_reason = "error"
                completion.error = f"an answer of {len(data) / 1e6:.6g} MB, and the ledger holds at most {most / 1e6:g}"
                data = _dump(_values(completion))
            at_once |= len(data) > COMMIT_AT_ONCE_BYTES
            self._pending.append((row, sample, data, _crc(data, b"%d %d" % (row, sample))))
        if at_once or len(self._pending) >= COMMIT_EVERY_ROWS:
            self.commit()
        elif self._committer is None:
            self._committer = threading.Thread(target=self._commit_in_time, name="llmpipe-ledger", daemon=True)
            self._committer.start()

    def check(self) -> None:
        """See whether what was added could be committed.

        Raises:
            LedgerError: the disk is full or cannot be written; what was committed before is safe.
        """
        if self._fault is not None:
            raise self._fault

    def commit(self) -> None:
        """Make everything that was added durable.

        Raises:
            LedgerError: as `check`.
            LLMError: what `before_commit` raises.
        """
        with self._turn:
            group = list(self._pending)  # others may be added meanwhile
            if not group:
                return
            self.before_commit()  # now: the group was computed by then
            with self._transaction():
                self._db.executemany("INSERT OR REPLACE INTO completions VALUES (?, ?, ?, ?)", group)
                _note(self._db, self.alongside())
            del self._pending[: len(group)]

    def _commit_in_time(self) -> None:
        """Commit what waits, again and again, until it cannot be done or the ledger is closed."""
        while not self._closing.wait(COMMIT_EVERY_S):
            try:
                self.commit()
            except Exception as error:  # whoever adds the next completions is told
                self._fault = error
                return

    def done(self, first: int, last: int) -> dict[int, frozenset[int]]:
        """Return the samples of each row in [first, last] that were committed; rows without any are left out."""
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
        for row, sample, data in self._verified():
            yield Completion(row, sample, *_load(data))

    def _verified(self) -> Iterator[tuple[int, int, bytes]]:
        with _faults_named(self.path):
            for row, sample, data, crc in self._db.execute("SELECT * FROM completions ORDER BY row, sample"):
                if type(data) is not bytes or crc != _crc(data, b"%d %d" % (row, sample)):
                    raise _damaged(self.path, f"row {row}, sample {sample} is not as it was written")
                yield row, sample, data

    def errors(self) -> Iterator[Completion]:
        """Yield every completion that is an error, by row and sample."""
        self.commit()
        with _faults_named(self.path):
            found = "SELECT row, sample, data FROM completions WHERE substr(data, 1, ?) = ? ORDER BY row, sample"
            for row, sample, data in self._db.execute(found, (len(_NO_TEXT), _NO_TEXT)):
                yield Completion(row, sample, *_load(data))

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

    def finish(self, **facts: Any) -> None:
        """Note that every row has its completions, and further facts."""
        self.set(complete=self.count(), **facts)

    def grow(self, fingerprint: dict[str, Any], **facts: Any) -> None:
        """Note what is asked now that there are more rows; what was written before is not the whole any more."""
        self.set(fingerprint=fingerprint, complete=None, written_as=None, **facts)

    def finished(self) -> bool:
        """Say whether every row has its completions.

        Raises:
            LedgerError: it had, and some are gone.
        """
        complete = self.get("complete")
        if complete is not None and complete != self.count():
            raise _damaged(self.path, f"of {complete} answers {self.count()} are left")
        return complete is not None

    def get(self, key: str) -> Any:
        """Return a noted fact about the run, or None."""
        return _fact(self.path, key, self._query("SELECT value, crc FROM meta WHERE key = ?", key))

    def set(self, **facts: Any) -> None:
        """Note facts about the run, durably and all together.

        Raises:
            LedgerError: the disk is full or cannot be written.
        """
        with self._transaction():
            _note(self._db, facts)

    def note_suspects(self, suspects: dict[int, int]) -> None:
        """Note how often rows that may end the process have been tried, after all that is finished."""
        self.commit()
        self.set(suspects=list(suspects.items()))

    def close(self) -> None:
        """Commit nothing, close the file, let others at the directory."""
        self._closing.set()
        if self._committer is not None:
            self._committer.join()
        try:
            if hasattr(self, "_db"):
                self._db.close()
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _query(self, sql: str, *values: Any) -> list[Any]:
        with self._turn, _faults_named(self.path):
            return self._db.execute(sql, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Write all that happens inside, synced to disk, or nothing of it."""
        if _identity(self.path) != self._file:  # SQLite would go on, in a file that is elsewhere, or nowhere
            raise LedgerError(
                f"{self.path.parent} was moved, replaced or deleted while the run went on; where it is now, it "
                f"continues with llmpipe resume"
            )
        with self._turn, _faults_named(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")


class LedgerSnapshot(Ledger):
    """What a ledger says at one moment, also while a run goes on. Takes no lock, waits for nobody, changes nothing.

    Args:
        directory: The run directory.
        fingerprint: What is asked now, where the run must have been asked the same.
        remark: What else is to be said of a difference.

    Raises:
        LedgerError: the directory holds no run, or a damaged one, or one of another fingerprint.
    """

    def __init__(self, directory: Path, fingerprint: dict[str, Any] | None = None, remark: str | None = None) -> None:
        self._remark = remark
        self.path = directory / FILE
        self._turn = threading.RLock()
        self._at_rest = not _has_journal(self.path) and _last_change(self.path)
        self._db = _begun(directory)
        try:
            with self._unchanged():
                self._query("BEGIN")
                self._check(fingerprint)
        except BaseException:
            self.close()
            raise

    def completions(self) -> Iterator[Completion]:
        """Yield every completion by row and sample; `check` tells whether they were what the ledger held.

        Raises:
            LedgerError: the file is damaged, or as `check`.
        """
        with self._unchanged():
            yield from super().completions()

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Call nothing damaged that was only written to."""
        try:
            yield
        except LedgerError:
            self.check()
            raise

    def check(self) -> None:
        """See whether a run that was at rest still is: its ledger is read as one that nobody writes to.

        Raises:
            LedgerError: it went on, and what was read may be anything.
        """
        if self._at_rest and self._at_rest != _last_change(self.path):
            raise LedgerError(f"the run in {self.path.parent} went on while this was reading it: do it once more")

    def commit(self) -> None:
        """Nothing is ever added here."""

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def locked(directory: Path, lock: filelock.BaseFileLock | None = None) -> filelock.BaseFileLock:
    """Let no other process at a run directory, which is made if it is not there, until the lock is released.

    Args:
        directory: The run directory.
        lock: The lock of it, where it is held already; then it has to be released once more.

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
        LedgerError: the file that should be the ledger is none, or damaged.
    """
    path = directory / FILE
    if not os.path.lexists(path):
        return False
    with _faults_named(path), closing(_read_only(path)) as db:
        return db.execute("SELECT 1 FROM sqlite_schema").fetchone() is not None


def _begun(directory: Path) -> sqlite3.Connection:
    """Open the ledger of a run that has begun, for reading.

    Raises:
        LedgerError: there is none.
    """
    if not begun(directory):
        raise LedgerError(f"{directory} is no run directory: no run has begun in it; give the run's own command")
    with _faults_named(directory / FILE):
        return _read_only(directory / FILE)


def _read_only(path: Path) -> sqlite3.Connection:
    """Open a ledger for reading; beside one at rest, SQLite would leave files of its own."""
    if not path.is_file():
        raise _damaged(path, "it is no file")
    mode = "mode=ro" if _has_journal(path) else "immutable=1"
    return sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True, isolation_level=None)


def _has_journal(path: Path) -> bool:
    """Say whether a run is at work on a ledger, or was killed at it."""
    return path.with_name(f"{FILE}-wal").exists()


def _last_change(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _create(path: Path, facts: Mapping[str, Any]) -> None:
    """Make a ledger that holds these facts; it has its name when it is complete and durable, and not before.

    Raises:
        LLMError: it cannot be written.
    """
    with new_files(path.parent, [FILE]) as files:
        for journal in ("-journal", "-wal", "-shm"):  # of a ledger that is gone: SQLite would take it for this one's
            path.with_name(f"{FILE}{journal}").unlink(missing_ok=True)
        with _faults_named(path), closing(sqlite3.connect(files[FILE].name, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode=OFF")  # what is not complete is thrown away, and `seal` syncs what is
            db.execute("PRAGMA synchronous=OFF")
            for statement in _TABLES:
                db.execute(statement)
            _note(db, facts)
        seal(files)


def saved_arguments(directory: Path) -> list[str]:
    """Return the command line that a run was started with; waits for no lock and changes nothing.

    Raises:
        LedgerError: the directory holds no run, or a damaged one.
    """
    (found,) = saved(directory, "arguments")
    found = found or []
    if not isinstance(found, list) or not all(isinstance(argument, str) for argument in found):
        raise _damaged(directory / FILE, "the arguments are no command line")
    return found


def saved(directory: Path, *keys: str) -> list[Any]:
    """Return facts about a run as they are noted, None for what is not; waits for no lock and changes nothing.

    Raises:
        LedgerError: the directory holds no run, or a damaged one.
    """
    path = directory / FILE
    with _faults_named(path), closing(_begun(directory)) as db:
        _check_version(path, db)
        query = "SELECT value, crc FROM meta WHERE key = ?"
        return [_fact(path, key, db.execute(query, (key,)).fetchall()) for key in keys]


def _check_version(path: Path, db: sqlite3.Connection) -> None:
    with _faults_named(path):
        (version,) = db.execute("PRAGMA user_version").fetchone()
    if version != VERSION:
        raise LedgerError(f"{path} was written by another version of llmpipe; finish it with that one")


def _note(db: sqlite3.Connection, facts: Mapping[str, Any]) -> None:
    texts = ((key, json.dumps(value)) for key, value in facts.items())
    rows = [(key, text, _crc(text.encode(), key.encode())) for key, text in texts]
    db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", rows)


def _fact(path: Path, key: str, found: list[tuple[str, int]]) -> Any:
    """Return a fact as it was noted, from what the file says of it."""
    if not found:
        return None
    value, crc = found[0]
    if not isinstance(value, str) or crc != _crc(value.encode(), key.encode()):
        raise _damaged(path, f"{key} is not as it was written")
    return json.loads(value)


def _crc(data: bytes, key: bytes) -> int:
    """Return a checksum of what stands under a key, and of the key: nothing may change its place unnoticed."""
    return crc32(data, crc32(key))


def _dump(values: Sequence[Any]) -> bytes:
    try:
        return orjson.dumps(values)
    except TypeError:  # half of a surrogate pair, which only an escape can hold
        return json.dumps(values).encode()


def _load(data: bytes) -> list[Any]:
    try:
        values: list[Any] = orjson.loads(data)
    except ValueError:
        values = json.loads(data)
    return values


@contextmanager
def _faults_named(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into one line; only a damaged file is to be moved away, not one on a full disk."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        # Without a code, Python itself says that text is none, or that it was misused.
        if code is None and isinstance(error, sqlite3.OperationalError) or (code or 0) & 0xFF in _OF_DAMAGE:
            raise _damaged(path, str(error)) from error
        raise LedgerError(f"cannot read or write {path}: {error}; what was committed before is safe") from error
    except UnicodeDecodeError as error:  # SQLite quotes what it cannot read, and Python cannot read the quotation
        raise _damaged(path, "what should be a table is no text") from error


def _identity(path: Path) -> int | None:
    """Return what stays the same of a file wherever it is moved, and nothing else has; None where it is not there."""
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _damaged(path: Path, what: str) -> LedgerError:
    return LedgerError(f"{path} is damaged or not a ledger ({what}); move it away to start again")


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Say, for two nested plain values, what was and what is, as `sampling.temperature was 0.0, is 0.7`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield f"{path} {change(old, new)}"

"""The ledger of the run that is going on: completions are added, and made durable in groups."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import filelock

from llmpipe.exceptions import LedgerError
from llmpipe.ledger.faults import faults_named
from llmpipe.ledger.format import checksum, key_of, note, packed
from llmpipe.ledger.opening import begun, create, locked
from llmpipe.ledger.reading import LedgerReader
from llmpipe.records import Completion

COMMIT_EVERY_S = 0.5
COMMIT_EVERY_ROWS = 2000
"""So many are committed at once by whoever adds them, so that nobody adds faster than the disk can take."""
COMMIT_AT_ONCE_BYTES = 2**16
"""An answer of more bytes is committed at once, so that few large ones are held."""
_BESIDE_BYTES = 1000
"""More than what SQLite keeps beside an answer, which counts towards the largest size that it takes."""


class Ledger(LedgerReader):
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
        super().__init__(directory)
        self.noted = 0
        """Completions added since the ledger was opened."""
        self.alongside: Callable[[], dict[str, Any]] = dict
        """Gives the facts that each commit notes with its completions, from whichever thread makes it."""
        self.before_commit: Callable[[], None] = lambda: None
        """Called by each commit, from whichever thread makes it; what it raises keeps its completions out."""
        self._pending: list[tuple[int, int, bytes, int]] = []
        self._closing = threading.Event()
        self._committer: threading.Thread | None = None
        self._fault: Exception | None = None
        """Why the thread commits no more."""
        with ExitStack() as opening:
            opening.callback(locked(directory, lock).release)
            if not begun(directory):
                create(self.path, {"fingerprint": fingerprint, **(facts or {})})
            with faults_named(self.path):
                self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
                opening.callback(self._db.close)
                self._verify(fingerprint, remark)
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
            self._file = _identity(self.path)
            self._opened = opening.pop_all()

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
            row, sample, data = completion.request_id, completion.sample, packed(completion)
            if len(data) > most:
                completion.text = completion.first_token_s = None
                completion.finish_reason = "error"
                completion.error = f"an answer of {len(data) / 1e6:.6g} MB, and the ledger holds at most {most / 1e6:g}"
                data = packed(completion)
            at_once |= len(data) > COMMIT_AT_ONCE_BYTES
            self._pending.append((row, sample, data, checksum(data, key_of(row, sample))))
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
                note(self._db, self.alongside())
            del self._pending[: len(group)]

    def _commit_in_time(self) -> None:
        """Commit what waits, again and again, until it cannot be done or the ledger is closed."""
        while not self._closing.wait(COMMIT_EVERY_S):
            try:
                self.commit()
            except Exception as error:  # whoever adds the next completions is told
                self._fault = error
                return

    def finish(self, **facts: Any) -> None:
        """Note that every row has its completions, and further facts."""
        self.commit()
        self.set(complete=self.count(), **facts)

    def grow(self, fingerprint: dict[str, Any], **facts: Any) -> None:
        """Note what is asked now that there are more rows; what was written before is not the whole any more."""
        self.set(fingerprint=fingerprint, complete=None, written_as=None, **facts)

    def set(self, **facts: Any) -> None:
        """Note facts about the run, durably and all together.

        Raises:
            LedgerError: the disk is full or cannot be written.
        """
        with self._transaction():
            note(self._db, facts)

    def note_suspects(self, suspects: dict[int, int]) -> None:
        """Note how often rows that may end the process have been tried, after all that is finished."""
        self.commit()
        self.set(suspects=list(suspects.items()))

    def close(self) -> None:
        """Close the file and release the directory's lock; what is not committed is dropped."""
        self._closing.set()
        if self._committer is not None:
            self._committer.join()
        self._opened.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Write all that happens inside, synced to disk, or nothing of it."""
        if _identity(self.path) != self._file:  # SQLite would go on, in a file that is elsewhere, or nowhere
            raise LedgerError(
                f"{self.directory} was moved, replaced or deleted while the run went on; where it is now, it "
                f"continues with llmpipe resume DIRECTORY"
            )
        with self._turn, faults_named(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")


def _identity(path: Path) -> int | None:
    """Return what stays the same of a file wherever it is moved, and nothing else has; None where it is not there."""
    try:
        return path.stat().st_ino
    except OSError:
        return None

"""What was committed to a ledger: read by whoever writes it, or by others, also while a run goes on."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Self

from llmpipe.exceptions import LedgerError
from llmpipe.ledger.faults import damaged, faults_named
from llmpipe.ledger.format import FILE, NO_TEXT, checksum, key_of, noted, unpacked
from llmpipe.ledger.opening import check_version, has_journal, last_change, opened
from llmpipe.records import Completion
from llmpipe.redaction import differences


class LedgerReader:
    """What was committed to a ledger.

    Args:
        directory: The run directory.
    """

    _db: sqlite3.Connection

    def __init__(self, directory: Path) -> None:
        self.directory, self.path = directory, directory / FILE
        self._turn = threading.RLock()
        """Held by the thread that uses the connection."""

    def _verify(self, fingerprint: dict[str, Any] | None, remark: str | None) -> None:
        """Refuse a ledger that is damaged or belongs to another run; without a fingerprint any run will do."""
        with faults_named(self.path):
            check_version(self.path, self._db)
        ((found,),) = self._query("PRAGMA quick_check(1)")
        if found != "ok":
            raise damaged(self.path, " ".join(found.split()))
        for _ in self._verified():  # SQLite checks its own structure only: read all, before hours of work are added
            pass
        known = self.get("fingerprint")
        if known is None:
            raise damaged(self.path, "the fingerprint is gone")
        # What is known came back from JSON, which has lists for tuples and texts for keys; so it has to be compared.
        if fingerprint is not None and known != json.loads(json.dumps(fingerprint)):
            changes = "; ".join([*differences(known, fingerprint), *([remark] if remark else [])])
            raise LedgerError(
                f"{self.directory} holds a run of another configuration: {changes}. Drop the difference "
                f"to go on with it, or use another hydra.run.dir"
            )

    def completions(self) -> Iterator[Completion]:
        """Yield every completion by row and sample.

        Raises:
            LedgerError: the file is damaged.
        """
        for row, sample, data in self._verified():
            yield unpacked(row, sample, data)

    def _verified(self) -> Iterator[tuple[int, int, bytes]]:
        with faults_named(self.path):
            for row, sample, data, crc in self._db.execute("SELECT * FROM completions ORDER BY row, sample"):
                if type(data) is not bytes or crc != checksum(data, key_of(row, sample)):
                    raise damaged(self.path, f"row {row}, sample {sample} is not as it was written")
                yield row, sample, data

    def errors(self) -> Iterator[Completion]:
        """Yield every completion that is an error, by row and sample."""
        with faults_named(self.path):
            found = "SELECT row, sample, data FROM completions WHERE substr(data, 1, ?) = ? ORDER BY row, sample"
            for row, sample, data in self._db.execute(found, (len(NO_TEXT), NO_TEXT)):
                yield unpacked(row, sample, data)

    def done(self, first: int, last: int) -> dict[int, frozenset[int]]:
        """Return the samples of each row in [first, last]; rows without any are left out."""
        found: dict[int, set[int]] = {}
        for row, sample in self._query("SELECT row, sample FROM completions WHERE row BETWEEN ? AND ?", first, last):
            found.setdefault(row, set()).add(sample)
        return {row: frozenset(samples) for row, samples in found.items()}

    def count(self) -> int:
        """Return how many completions there are."""
        return int(self._query("SELECT count(*) FROM completions")[0][0])

    def rows(self) -> int:
        """Return how many rows have at least one completion."""
        return int(self._query("SELECT count(DISTINCT row) FROM completions")[0][0])

    def most_samples(self) -> int:
        """Return the largest number of samples that a row has."""
        return int(self._query("SELECT coalesce(max(sample), -1) FROM completions")[0][0]) + 1

    def finished(self) -> bool:
        """Say whether every row has its completions.

        Raises:
            LedgerError: it had, and some are gone.
        """
        complete = self.get("complete")
        if complete is not None and complete != self.count():
            raise damaged(self.path, f"of {complete} answers {self.count()} are left")
        return complete is not None

    def get(self, key: str) -> Any:
        """Return a noted fact about the run, or None."""
        with self._turn, faults_named(self.path):
            return noted(self.path, self._db, key)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _query(self, sql: str, *values: Any) -> list[Any]:
        with self._turn, faults_named(self.path):
            return self._db.execute(sql, values).fetchall()


class LedgerSnapshot(LedgerReader):
    """What a ledger says at one moment, also while a run goes on. Takes no lock, waits for nobody, changes nothing.

    Args:
        directory: The run directory.
        fingerprint: What is asked now, where the run must have been asked the same.
        remark: What else is to be said of a difference.

    Raises:
        LedgerError: the directory holds no run, or a damaged one, or one of another fingerprint.
    """

    def __init__(self, directory: Path, fingerprint: dict[str, Any] | None = None, remark: str | None = None) -> None:
        super().__init__(directory)
        self._at_rest = not has_journal(self.path) and last_change(self.path)
        with self._unchanged():
            self._db = opened(directory)
            try:
                self._query("BEGIN")
                self._verify(fingerprint, remark)
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
        """Say of a ledger that looks damaged because a run goes on writing to it that it is in use."""
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
        if self._at_rest and self._at_rest != last_change(self.path):
            raise LedgerError(f"the run in {self.directory} went on while this was reading it: do it once more")


def saved_arguments(directory: Path) -> list[str]:
    """Return the command line that a run was started with; waits for no lock and changes nothing.

    Raises:
        LedgerError: the directory holds no run, or a damaged one.
    """
    (found,) = saved(directory, "arguments")
    found = found or []
    if not isinstance(found, list) or not all(isinstance(argument, str) for argument in found):
        raise damaged(directory / FILE, "the arguments are no command line")
    return found


def saved(directory: Path, *keys: str) -> list[Any]:
    """Return facts about a run as they are noted, None for what is not; waits for no lock and changes nothing.

    Raises:
        LedgerError: the directory holds no run, or a damaged one.
    """
    path = directory / FILE
    with faults_named(path), closing(opened(directory)) as db:
        check_version(path, db)
        return [noted(path, db, key) for key in keys]

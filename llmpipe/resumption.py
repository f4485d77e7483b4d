"""What a run directory knows of the run that began there, and what it notes of one that goes on."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmpipe.config import DatasetConfig
from llmpipe.datasets import Scan, digest_of, first_change
from llmpipe.ledger import Ledger, begun, saved

log = logging.getLogger(__name__)


class Before(NamedTuple):
    """What is noted in a directory of the run that began there, if one did."""

    begun: bool = False
    fingerprint: dict[str, Any] | None = None
    files: list[list[Any]] | None = None
    """Digests of what the dataset's rows held, file by file."""

    @classmethod
    def of(cls, directory: Path) -> Before:
        """Read what a directory's ledger has noted, without changing the ledger.

        Raises:
            LedgerError: the ledger is damaged.
        """
        return cls(True, *saved(directory, "fingerprint", "dataset_files")) if begun(directory) else cls()

    @property
    def rows(self) -> int | None:
        """How many rows the dataset had."""
        rows: int | None = (self.fingerprint or {}).get("dataset", {}).get("rows")
        return rows

    def continued(self, asked: dict[str, Any], scan: Scan) -> dict[str, Any]:
        """Return a fingerprint with the dataset as it was known, if that has only grown since.

        Args:
            asked: The fingerprint of what is asked now.
            scan: What is in the dataset now, and was in its first rows, as many as there were.
        """
        if not self.fingerprint or scan.earlier is None:
            return asked
        now, before = asked["dataset"], self.fingerprint["dataset"]
        most = [math.inf if dataset.get("limit") is None else dataset["limit"] for dataset in (before, now)]
        as_before = {**now, **{name: before.get(name) for name in ("digest", "rows", "limit")}}
        grown = digest_of(scan.earlier) == before.get("digest") and most[0] <= most[1] and as_before == before
        return {**asked, "dataset": before} if grown else asked

    def change(self, scan: Scan, config: DatasetConfig) -> str | None:
        """Say which file of the dataset has changed, if one has; None where now other rows of it are asked for."""
        known = (self.fingerprint or {}).get("dataset", {})
        others = (config.shuffle, config.offset) != (known.get("shuffle"), known.get("offset"))
        if others or (config.limit is not None and config.limit < (self.rows or 0)):
            return None
        return first_change(self.files or [], scan.contents if scan.earlier is None else scan.earlier)


def begun_with(arguments: Sequence[str]) -> dict[str, Any]:
    """Return, as the ledger notes them, a run's command line and the directory that its relative paths start from."""
    try:
        place = os.getcwd()
    except OSError:  # it is gone, and so nothing was named from there
        place = None
    return {"arguments": list(arguments), "working_directory": place}


def note_asked(ledger: Ledger, asked: dict[str, Any], scan: Scan, arguments: Sequence[str]) -> None:
    """Note the fingerprint, and the arguments, where they are new: at the beginning, and when the dataset has grown."""
    known = ledger.get("fingerprint")["dataset"]
    facts = {**(begun_with(arguments) if arguments else {}), "dataset_files": scan.contents}
    if asked["dataset"]["rows"] != known["rows"]:
        log.info("the dataset has grown from %d to %d rows: the new ones are run", known["rows"], scan.rows)
        ledger.grow(asked, **facts)
    elif asked["dataset"] != known or ledger.get("arguments") is None:
        ledger.set(fingerprint=asked, **facts)

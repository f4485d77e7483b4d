"""Temporary directories that are always removed: those of a process that was killed, by the next process."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

PREFIX, LOCK = ".llmpipe-", ".lock"
YOUNG_S = 60
"""An unlocked directory of this age may be of a process that has only just made it."""


@contextmanager
def temporary_directory(place: Path | None = None) -> Iterator[Path]:
    """Make a directory for the time of the block.

    Args:
        place: Where; by default, where temporary files go.
    """
    place = place or Path(tempfile.gettempdir())
    _clear(place)
    made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    try:
        with filelock.FileLock(made / LOCK):
            yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _clear(place: Path) -> None:
    """Remove the directories whose owners have died."""
    for path in place.glob(f"{PREFIX}*"):
        with suppress(OSError, filelock.Timeout):
            status = path.lstat()
            mine = not hasattr(os, "getuid") or status.st_uid == os.getuid()
            if mine and path.is_dir() and not path.is_symlink() and time.time() - status.st_mtime > YOUNG_S:
                with filelock.FileLock(path / LOCK, timeout=0):
                    shutil.rmtree(path)

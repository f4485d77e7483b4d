"""What can be read only once, standard input and pipes → a copy in the run directory, so that a resume has it."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Self

from llmpipe.config.checks import readable
from llmpipe.exceptions import DatasetError
from llmpipe.quoting import how_to_resume
from llmpipe.system.temporary import temporary_directory

log = logging.getLogger(__name__)

_OPEN_FILE = re.compile(r"-|/dev/(stdin|fd/\d+)|/proc/(self|\d+)/fd/\d+")
_spent: set[str] = set()
"""Streams that this process has read to their end; they cannot be read again."""


class Inputs:
    """The copies of one run's streams. They go when its `with` block ends, unless `keep` was called.

    Args:
        directory: The run directory; by default a temporary one.
        begun: Whether a run has begun there, which has its copies.
        resumed: Whether those are to be used without a look at the streams; else these must hold the same.
    """

    def __init__(self, directory: Path | None = None, begun: bool = False, resumed: bool = False) -> None:
        self._temporary = ExitStack()
        self._given = directory
        self._begun, self._resumed = begun, resumed
        self._made: list[Path] = []

    @cached_property
    def _directory(self) -> Path:  # made only for a stream
        return self._given or self._temporary.enter_context(temporary_directory())

    def copy_of(self, path: str, number: int) -> Path | None:
        """Return the copy of the stream that a path names; None where the path is not a stream.

        Args:
            path: As `dataset.path` has it.
            number: Of the path among those of the run.

        Raises:
            DatasetError: it cannot be read, is not what the run began with, or the copy is gone.
        """
        resumed = self._begun and self._resumed
        if not resumed and not _is_stream(path):
            return None
        copy = self._directory / f".input-{number}"
        if resumed:
            if copy.is_file() or not _is_stream(path):
                return copy if copy.is_file() else None
            raise DatasetError(f"{copy} is gone, the copy of what was read from dataset.path={path!r}")
        new = copy.with_name(f"{copy.name}.tmp")
        self._made.append(new)  # before it is written, so that it is removed after a full disk or an interrupt
        self._read(path, new)
        if not self._begun:
            self._made.append(copy)
            os.replace(new, copy)
            return copy
        same = copy.is_file() and _digest(new) == _digest(copy)
        new.unlink()
        if not same:
            raise DatasetError(
                f"dataset.path={path!r} is not what the run in {self._directory} began with: go on with "
                f"{how_to_resume(self._directory)}, or choose another hydra.run.dir"
            )
        return copy

    def _read(self, path: str, file: Path) -> None:
        if path in _spent:
            raise DatasetError(
                f"dataset.path={path!r} has been read, and can be read only once: save it as a file first"
            )
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with _opened(path) as stream, file.open("wb") as written:
                shutil.copyfileobj(stream, written, 2**20)
                written.flush()
                os.fsync(written.fileno())
        except OSError as error:
            raise DatasetError(
                f"dataset.path={path!r} cannot be copied to {file.parent}: {error.strerror or error}"
            ) from error
        if _OPEN_FILE.fullmatch(path):
            _spent.add(path)
        log.info("dataset.path=%s: %.1f MB read", path, file.stat().st_size / 1e6)

    def keep(self) -> None:
        """Leave the copies where they are: the run has begun."""
        self._made.clear()

    def __enter__(self) -> Self:
        if not self._begun:
            for left in self._directory.glob(".input-[0-9]*"):  # by a run that was killed before it had begun
                left.unlink()
        return self

    def __exit__(self, *exc: object) -> None:
        for copy in self._made:
            copy.unlink(missing_ok=True)
        self._temporary.close()


def _is_stream(path: str) -> bool:
    if _OPEN_FILE.fullmatch(path):
        return True
    with readable("dataset.path", path, DatasetError):
        file = Path(path).expanduser()
        return file.exists() and not file.is_file() and not file.is_dir()


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    with open(0, "rb", closefd=False) if path in ("-", "/dev/stdin") else Path(path).expanduser().open("rb") as stream:
        yield stream


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

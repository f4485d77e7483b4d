"""Files that are whole or not there: written under temporary names, synced, then renamed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from llmpipe.exceptions import LedgerError, LLMError


def found_files(directory: Path, names: Iterable[str], known: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the digest of each file that is there already, having made sure that it is the run's own.

    Args:
        directory: The run directory.
        names: The files to look for, besides the known ones.
        known: The digests that a file may have, by name.

    Raises:
        LedgerError: a file is of another origin or was changed.
    """
    there = {name: file_digest(directory / name) for name in {*names, *known} if os.path.lexists(directory / name)}
    for name, digest in sorted(there.items()):
        if name not in known:
            raise LedgerError(f"{directory / name} is not of this run; move it away, or choose another hydra.run.dir")
        if digest not in known[name]:
            raise LedgerError(f"{directory / name} was changed since the run; move it away to have it written again")
    return there


@contextmanager
def new_files(directory: Path, names: Iterable[str]) -> Iterator[dict[str, IO[bytes]]]:
    """Open files that get their names when the block ends without an error; `seal` them first.

    Raises:
        LLMError: the disk is full or cannot be written.
    """
    temporaries = {name: directory / f".{name}.tmp" for name in names}
    try:
        with ExitStack() as stack:
            yield {name: stack.enter_context(_fresh(path)) for name, path in temporaries.items()}
        for name, temporary in temporaries.items():
            os.replace(temporary, directory / name)
        _sync_directory(directory)
    except OSError as error:
        raise LLMError(f"cannot write to {directory}: {error.strerror or error}") from error
    finally:
        for temporary in temporaries.values():
            with suppress(OSError):  # where nothing can be written, nothing can be removed
                temporary.unlink(missing_ok=True)


def _fresh(path: Path) -> IO[bytes]:
    path.unlink(missing_ok=True)  # of a run that was killed
    return path.open("xb")


def seal(files: Mapping[str, IO[bytes]]) -> dict[str, str]:
    """Make the content of open files durable, and return the digest of each."""
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
    return {name: file_digest(Path(file.name)) for name, file in files.items()}


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":  # elsewhere a directory cannot be opened, and the rename is durable by itself
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        LLMError: the file cannot be read.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(
            mode
        ):  # to open a pipe would be to wait for whoever writes to it
            raise LLMError(f"cannot read {path}: it is no regular file; move it away")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LLMError(f"cannot read {path}: {error.strerror or error}") from error

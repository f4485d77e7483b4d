"""Files that are written again and again under one name, as an export is: only over what llmpipe itself wrote there.

Beside such a file stands a note with its digest and with what it was written for. A file without a note, or with
another digest, is somebody's own and is never replaced.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import filelock

from llmpipe.exceptions import LLMError
from llmpipe.system.files import file_digest, new_files, seal
from llmpipe.system.links import check_link


def note_of(path: Path) -> Path:
    """Return the path of the note on a file."""
    return path.with_name(f".{path.name}.llmpipe")


def refuse_foreign(path: Path, of: Mapping[str, Any], force: bool = False) -> list[str]:
    """See to it that a name is free, or what it names was written by llmpipe, for the same purpose.

    Args:
        path: The file that is to be written.
        of: What it is written for, such as a run: plain values; those that are not known yet are None.
        force: Whether what llmpipe wrote for another purpose may be replaced too.

    Returns:
        The digest of the file that stands there, in a list; an empty list where there is none.

    Raises:
        LLMError: it is not to be replaced; says why, and what to do.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return []
    except OSError as error:
        raise LLMError(f"cannot write {path}: {error.strerror or error}") from error
    if not stat.S_ISREG(mode):
        what = "a symlink" if stat.S_ISLNK(mode) else "a directory" if stat.S_ISDIR(mode) else "no regular file"
        raise LLMError(f"cannot write {path}: it is {what}; choose another name")
    digests, known = _noted(path)
    if not digests:
        raise LLMError(f"{path} is there already, and llmpipe did not write it; move it away, or choose another name")
    digest = file_digest(path)
    if digest not in digests:
        raise LLMError(f"{path} was changed since llmpipe wrote it; move it away, or choose another name")
    settled = {name: value for name, value in known.items() if value is not None}
    if not settled.items() <= of.items() and not force:
        where = f" (in {known['directory']})" if isinstance(known.get("directory"), str) else ""
        raise LLMError(f"{path} was exported from another run{where}; choose another name, or replace it with --force")
    return [digest]


def _noted(path: Path) -> tuple[list[str], dict[str, Any]]:
    """Return the digests that a file may have, and what it was written for; nothing where there is no note."""
    if not note_of(path).is_file():  # it may be a pipe, which nobody writes to
        return [], {}
    try:
        note = json.loads(note_of(path).read_bytes())
        return list(note["digests"]), dict(note["of"])
    except (OSError, ValueError, KeyError, TypeError):
        return [], {}


@contextmanager
def own_file(path: Path, of: Mapping[str, Any], force: bool = False) -> Iterator[IO[bytes]]:
    """Open a file that gets its name when the block ends without an error, if `refuse_foreign` has nothing against it.

    Raises:
        LLMError: as `refuse_foreign`, or another process writes it, or the disk is full or cannot be written.
    """
    note = note_of(path).name
    # The note gets its name first: one that is killed between the two leaves a note that knows both files.
    with _alone(path), new_files(path.parent, [note, path.name]) as files:
        yield files[path.name]
        digests = [*seal({path.name: files[path.name]}).values(), *refuse_foreign(path, of, force)]
        files[note].write(json.dumps({"digests": digests, "of": of}).encode("ascii") + b"\n")
        seal({note: files[note]})


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let no other process write the file, whose temporary names are the same.

    Raises:
        LLMError: one does, or the directory cannot be written.
    """
    file = path.with_name(f"{note_of(path).name}.lock")
    check_link(file)
    lock = filelock.FileLock(file, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise LLMError(f"{path} is being written by another process: wait for it, or choose another name") from error
    except OSError as error:
        raise LLMError(f"cannot write to {path.parent}: {error.strerror or error}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()  # before the next one can have it
        lock.release()


def is_same(path: Path, other: Path) -> bool:
    """Say whether two names are of one file, whatever links or letters they are written with."""
    try:
        return os.path.samefile(path, other)
    except (OSError, ValueError):
        return False

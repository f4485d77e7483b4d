"""What rows hold, file by file, as digests: whether a dataset has changed, where, or has only grown."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from llmpipe.records import Row


class FileContent(NamedTuple):
    """The rows of one file, or its first ones."""

    file: str
    rows: int
    digest: str


class Contents:
    """Looks at rows one after another.

    Args:
        by_file: Whether the rows of a file stand together; else all count as one file's.
    """

    def __init__(self, by_file: bool = True) -> None:
        self._by_file = by_file
        self._whole: list[FileContent] = []
        self._file: str | None = None
        self._rows = 0
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, row: Row) -> None:
        """Look at the next row."""
        if row.file != self._file and (self._by_file or self._file is None):
            self._whole = self.so_far()
            self._file, self._rows, self._hash = row.file, 0, hashlib.blake2b(digest_size=16)
        data = row.raw if row.raw is not None else repr(row.values).encode("utf-8", "surrogatepass")
        self._rows += 1
        self._hash.update(b"%d %b" % (len(data), data))

    def so_far(self) -> list[FileContent]:
        """Return what was seen until now."""
        if self._file is None:
            return []
        return [*self._whole, FileContent(self._file, self._rows, self._hash.hexdigest())]


def digest_of(contents: Iterable[FileContent]) -> str:
    """Return one digest of the rows of all files, whatever these are called."""
    text = "".join(f"{content.rows} {content.digest}\n" for content in contents)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def first_change(before: Sequence[Sequence[Any]], now: Sequence[FileContent]) -> str | None:
    """Say which file of before has other rows now; None where none has.

    Args:
        before: Files as `FileContent`s or lists of the same.
        now: Those of at most as many rows.
    """
    for number, (file, rows, digest) in enumerate(before):
        if number >= len(now):
            return f"the {rows} rows of {file} are gone"
        if (now[number].rows, now[number].digest) != (rows, digest):
            renamed = "" if now[number].file == file else f", which was {file},"
            return f"{now[number].file}{renamed} has other rows than before"
    return None

"""What rows hold, block by block, as digests: whether a dataset has changed, where, or has only grown.

One pass over the rows is noted; what it saw is the dataset. Of any later pass no row is handed on before its block is
known to hold the same, so that nothing comes of a file that is overwritten, even if it is put back before anyone looks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from llmpipe.exceptions import DatasetError
from llmpipe.records import Row

BLOCK_BYTES, ROW_BYTES = 2**22, 2**13
"""What rows may take before their block ends, and what each takes besides its content: a block has 512 rows at most."""


class FileContent(NamedTuple):
    """The rows of one file, or its first ones."""

    file: str
    rows: int
    digest: str


_NOTHING = FileContent("", 0, "")


class Contents:
    """What the rows of a dataset hold.

    Args:
        together: What the files are called if the rows of all count as one file's; None if each has its own together.
        mark: After how many rows a block ends in any case, so that it can be said what these hold.
    """

    def __init__(self, together: str | None = None, mark: int | None = None) -> None:
        self._together, self._mark = together, mark
        self._ends: list[FileContent] = []
        """What was seen of a file until the end of a block, for each block."""
        self.marked: list[FileContent] | None = [] if mark == 0 else None
        """What the first rows hold, as many as `mark` says, file by file; None where there are fewer."""

    def note(self, rows: Iterable[Row]) -> Iterator[list[Row]]:
        """Yield rows in blocks, and note what these hold."""
        for block, end in self._blocks(rows):
            self._ends.append(end)
            if block[-1].index + 1 == self._mark:
                self.marked = self.files()
            yield block

    def compare(self, rows: Iterable[Row]) -> Iterator[list[Row]]:
        """Yield rows in blocks, each only after it was found to hold what was noted of it.

        Raises:
            DatasetError: the next block holds something else.
        """
        blocks, before = self._blocks(rows), _NOTHING
        for noted in self._ends:
            block, end = next(blocks, ([], _NOTHING))
            if end != noted:
                first = before.rows + 1 if before.file == noted.file else 1
                raise changed(noted.file, f"of its rows that are run, {first} to {noted.rows} are not what they were")
            yield block
            before = noted

    def files(self) -> list[FileContent]:
        """Return what was noted of each file."""
        return [end for end, after in pairwise([*self._ends, _NOTHING]) if after.file != end.file]

    def _blocks(self, rows: Iterable[Row]) -> Iterator[tuple[list[Row], FileContent]]:
        """Yield rows in blocks, each of one file, with what was seen of this until there."""
        block: list[Row] = []
        file, seen, room, digest = "", 0, 0, _new_digest()
        for row in rows:
            name = self._together or row.file
            if block and (room <= 0 or name != file or row.index == self._mark):
                yield block, FileContent(file, seen, digest.hexdigest())
                block = []
            if not block:
                room = BLOCK_BYTES
                if name != file:
                    file, seen, digest = name, 0, _new_digest()
            data = row.raw if row.raw is not None else repr(row.values).encode("utf-8", "surrogatepass")
            digest.update(b"%d %b" % (len(data), data))
            seen += 1
            room -= len(data) + ROW_BYTES
            block.append(row)
        if block:
            yield block, FileContent(file, seen, digest.hexdigest())


def _new_digest() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)


def changed(file: object, how: str) -> DatasetError:
    """Return the error that ends what reads a file which is not any more what it was."""
    return DatasetError(
        f"{file} was changed while it was read: {how}. Nothing came of the change: put the file back as it was and "
        f"resume, or use another hydra.run.dir"
    )


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

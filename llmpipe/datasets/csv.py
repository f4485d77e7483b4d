"""CSV with a header and any delimiter, as spreadsheets write it; its quotes may be damaged."""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Self

from llmpipe.config import DatasetConfig
from llmpipe.datasets.jsonl import DEFAULTS, too_large
from llmpipe.datasets.opening import open_bytes
from llmpipe.exceptions import DatasetError
from llmpipe.quoting import listed, quoted, repeated
from llmpipe.records import Row
from llmpipe.text import is_utf8

MAX_ROW_LINES = 2**16
"""Most lines that the quoted cells of a row may span; what goes on longer is a quote that was never closed."""


_DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
_UTF8 = "save the file as UTF-8"
_SEPARATOR = re.compile(r"sep=(.)\s*", re.IGNORECASE)


def read_csv(path: Path, config: DatasetConfig = DEFAULTS) -> Iterator[Row]:
    """Yield the rows of a CSV file with a header; all values are text, and an empty cell is null.

    Blanks around the header's names are no part of them, and empty cells at its end, as spreadsheets leave them, no
    columns.
    """
    csv.field_size_limit(2**31 - 1)
    source = str(path)
    with open_bytes(path) as file:
        text = _physical(io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=""), config)
        before, head = _first_of(text)
        separator = _SEPARATOR.fullmatch(head)
        if separator:  # as Excel has it: not a row, but what parts the cells
            blanks, head = _first_of(text)
            before += 1 + blanks
        delimiter = separator[1] if separator else _delimiter(path, config, head)
        lines = _Lines(chain([head], text), delimiter, before, config.max_row_bytes)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header = [name.strip() for name in next((cells for cells in reader if cells), [])]
        width = len(header)
        while header and not header[-1]:
            header.pop()
        if len(set(header)) != len(header):
            raise DatasetError(f"{path}: the header names a column twice: {listed(repeated(header))}")
        if not all(is_utf8(name) for name in header):
            raise DatasetError(f"{path}: the header is not valid UTF-8; {_UTF8}")
        while True:
            line = lines.begin_row()
            error: str | None
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as problem:
                error = f"not valid CSV: {problem}"
            else:
                if not cells:
                    continue
                if len(header) < len(cells) <= width and not any(cells[len(header) :]):
                    del cells[len(header) :]
                error = _problem_of_cells(cells, header)
            if lines.too_large:
                yield too_large(source, line, lines.taken[0].encode("utf-8", "surrogateescape"), config)
                continue
            if error is None:
                values = {name: cell or None for name, cell in zip(header, cells, strict=True)}
                yield Row(source, line, values, typed=False)
                continue
            if lines.give_back():
                within = f" within the {config.max_row_mb:g} MB of dataset.max_row_mb=" if lines.overflows else ""
                error = f"not valid CSV: a quote that opens on line {line} is never closed{within}"
            raw = "".join(lines.taken).rstrip("\r\n").encode("utf-8", "surrogateescape")
            yield Row(source, line, {}, raw, error)


def _physical(text: io.TextIOWrapper, config: DatasetConfig) -> Iterator[str]:
    """Yield the lines of a text; of one that is too large the beginning, just so long that this shows."""
    most, next_begins = config.max_row_bytes, ""
    # `readline` has room for the largest line and CRLF: what fills it without an end is of a line that is too large.
    while line := next_begins + text.readline(most + 2):
        next_begins = ""
        if len(line) > most + 1:
            piece = line
            while piece and piece[-1] not in "\r\n":
                piece = text.readline(2**16)
            if piece.endswith("\r") and (after := text.read(1)) != "\n":  # CRLF may have been cut in two
                next_begins = after
        yield line


def _first_of(lines: Iterator[str]) -> tuple[int, str]:
    """Return the first line that is not blank, and how many are before it."""
    return next(((number, line) for number, line in enumerate(lines) if line.strip()), (0, ""))


def _delimiter(path: Path, config: DatasetConfig, head: str) -> str:
    """Return what parts the cells: as configured, or as the header tells by the columns that are looked for."""
    given = config.csv.delimiter.replace("\\t", "\t")
    if given != "auto":
        return _DELIMITERS.get(given, given)
    if config.format == "tsv" or ".tsv" in path.name.lower():
        return "\t"
    wanted = set(vars(config.columns).values())

    def likely(delimiter: str) -> tuple[int, int]:
        names = next(csv.reader([head], delimiter=delimiter), [])
        return len(wanted & {name.strip() for name in names}), len(names)

    return max(_DELIMITERS.values(), key=likely)


_NEXT_QUOTE = re.compile(r'(?:^|([^"]))(?:"")*"(?!")')
"""The first quote that is no half of an escaped one; the group is the character before it and quotes that touch it."""


class _Lines:
    """The lines of a CSV file. A quote that is never closed takes the rows after it; they can be given back."""

    def __init__(self, text: Iterator[str], delimiter: str, before: int, most: int) -> None:
        self._text = text
        self._before_cell = (None, delimiter, "\r", "\n")
        self._given_back: deque[str] = deque()
        self._before = before
        self._most = most
        self._size = 0
        self._cut = False
        self.taken: list[str] = []
        """The lines of the row at hand."""

    def begin_row(self) -> int:
        """Forget the lines of the row before, and return the number of the next one."""
        self._before += len(self.taken)
        self._cut, self._size = False, 0
        self.taken.clear()
        return self._before + 1

    @property
    def overflows(self) -> bool:
        """Whether the row at hand has more characters than bytes are allowed."""
        return self._size > self._most

    @property
    def too_large(self) -> bool:
        """Whether it is a single line that has."""
        return self.overflows and len(self.taken) == 1 and len(self.taken[0]) > self._most

    def give_back(self) -> bool:
        """Give all but the first line back if that one left a quote open, and say whether it did."""
        later = self.taken[1:]
        quote = _NEXT_QUOTE.search("".join(later))
        # A quote that the first line leaves open makes all that follows the inside of one cell, up to the next quote.
        # Was it meant so, that quote stands after text, as one that closes a cell does. Does it stand where a cell
        # begins (at the start of a line, or after a delimiter), it was to open one of another row, and the first
        # line's quote is one too many. So it is, too, where the file or a row's size ended before there was another.
        if not self._cut and (quote is None or quote[1] not in self._before_cell):
            return False
        self._given_back.extendleft(reversed(later))
        del self.taken[1:]
        return True

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = self._given_back.popleft() if self._given_back else next(self._text, None)
        self._size += len(line or "")
        self._cut = line is None or len(self.taken) == MAX_ROW_LINES or self.overflows
        if line is None:
            raise StopIteration
        if self._cut and self.taken:
            self._given_back.appendleft(line)
            raise csv.Error(f"a row of more than {MAX_ROW_LINES} lines, or {self._most} bytes")
        self.taken.append(line)
        if self._cut:
            raise csv.Error(f"a line of more than {self._most} bytes")
        return line


def _problem_of_cells(cells: list[str], header: list[str]) -> str | None:
    if len(cells) != len(header):
        return f"{len(cells)} cells, and the header has {len(header)}"
    wrong = next((name for name, cell in zip(header, cells, strict=True) if not is_utf8(cell)), None)
    return wrong and f"the column {quoted(wrong)} is not valid UTF-8: {_UTF8}"

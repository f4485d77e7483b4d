"""JSON of any layout: arrays of rows, pretty-printed rows one after another, or a list inside an object.

Of a file of any size, one row at a time is held, and none that is too large. Where a row begins and ends is told by its
brackets; what it holds is read by what reads JSONL, with the same exactness, and a row that is wrong inside is an error
row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO

import numpy as np

from llmpipe.config import DatasetConfig
from llmpipe.datasets.jsonl import DEFAULTS, KEPT_BYTES, row_of, too_large
from llmpipe.datasets.opening import open_bytes
from llmpipe.exceptions import DatasetError
from llmpipe.quoting import Names, listed, quoted, shortened
from llmpipe.records import Row

HEAD_BYTES = 2**20
"""How much of a file is looked at to tell its layout."""
MAX_DEPTH = 8
"""How deep inside an object a list of rows is looked for."""
_BLOCK = 2**16
_STRING = rb'"[^"\\\r\n]*+(?:\\.[^"\\\r\n]*+)*+"'
_TOKEN = re.compile(_STRING + rb'|[\[\]{}"]')
_STRINGS = re.compile(_STRING)
_WHOLE = re.compile(rb'(?:[^"]++|' + _STRING + rb")*+")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_FEW = 4096
"""So many brackets and strings of a row are looked at one by one, and then whole blocks; most rows have fewer."""
_IN_STRING = re.compile(rb'[^"\\\r\n]*+(?:\\.[^"\\\r\n]*+)*+')
_SCALAR = re.compile(_STRING + rb'|[^][{}",: \t\r\n]*')
_BLANKS = re.compile(rb"[ \t\r\n]*")
_BREAK = re.compile(rb"[\r\n][ \t\r\n]*")
_END = -1


def read_json(path: Path, config: DatasetConfig = DEFAULTS) -> Iterator[Row]:
    """Yield the rows of a file of JSON values: each object, each item of an array, or those of `dataset.field`.

    Raises:
        ValueError: brackets or quotes do not match, so that nobody can tell where a row ends.
        DatasetError: there is no such field, or it is no list.
    """
    name = str(path)
    with open_bytes(path) as file:
        text = _Text(file, config.max_row_bytes)
        if config.field is not None:
            _enter(text, config.field, name)
            yield from _items(text, name, config)
            return
        while (first := text.peek()) != _END:
            if first == ord("["):
                yield from _items(text, name, config)
            else:
                yield _row(text, name, config)


def _items(text: _Text, name: str, config: DatasetConfig) -> Iterator[Row]:
    text.expect(b"[")
    while text.peek() != ord("]"):
        yield _row(text, name, config)
        if text.peek() != ord("]"):
            text.expect(b",")
    text.expect(b"]")


def _row(text: _Text, name: str, config: DatasetConfig) -> Row:
    text.peek()
    line = text.line
    try:
        raw = text.value()
    except _TooLarge as error:
        return too_large(name, line, error.beginning, config)
    # Between the parts of a value a break is only layout; inside of a string it cannot stand.
    return row_of(name, line, raw if b"\n" not in raw and b"\r" not in raw else _BREAK.sub(b" ", raw))


def holds_lines(head: bytes, whole: bool) -> bool:
    """Say whether JSON text is a row per line, by its first value: a damaged line is no sign of another layout.

    Args:
        head: The beginning of the text.
        whole: Whether that is all of it.
    """
    text = head.decode("utf-8", "replace").lstrip(" \t\r\n")
    line, _, rest = text.partition("\n")
    more = bool(rest.strip(" \t\r\n"))
    if not text.startswith(("{", "[")) or (text[0] == "[" and not text[1:].lstrip().startswith("{")):
        return True
    try:
        end = json.JSONDecoder().raw_decode(text)[1]
    except RecursionError:
        return True
    except json.JSONDecodeError as error:
        if not whole and (error.pos > len(text) - 16 or error.msg.startswith("Unterminated")):  # it is cut off there
            return text[0] == "{" and line == text
        if error.pos <= len(line):
            return text[0] == "{" or more
        of_next_line = text[error.pos :].startswith(("{", "[")) and line.strip() not in ("{", "[")
        return of_next_line or line.rstrip()[-1] not in "{[,"
    if end > len(line):
        return False
    return more or (text[0] == "{" and not line[end:].strip())


def has_no_end(path: Path, config: DatasetConfig) -> bool:
    """Say whether the first value of a file of JSON is open to the end of the file, or to a quote that never closes."""
    with open_bytes(path) as file:
        try:
            _Text(file, config.max_row_bytes).value(keep=False)
        except ValueError:
            return True
    return False


def has_a_row_on_a_line(head: bytes) -> bool:
    """Say whether a line of JSON text after the first is an object of its own."""
    for line in head.splitlines()[1:]:
        if line.startswith(b"{") and line.rstrip().endswith(b"}"):
            try:
                json.loads(line)
            except (ValueError, RecursionError):
                continue
            return True
    return False


def field_of(path: Path, config: DatasetConfig) -> str | None:
    """Return the field of a file's only object that holds the rows; None where the file's values are rows themselves.

    Raises:
        DatasetError: there are several.
    """
    if config.field is not None:
        return config.field
    with open_bytes(path) as file:
        text = _Text(file, config.max_row_bytes)
        if text.peek() != ord("{"):
            return None
        of_rows = {config.columns.prompt, config.columns.messages}
        unseen = set(of_rows)
        found = _lists(text, unseen)
        try:
            lists = list(islice(found, 2))
            there = listed(chain(lists, found))
        except _TooLarge:  # a key, which its row is then told of
            return None
        if text.peek() != _END or unseen != of_rows:
            return None
    if len(lists) > 1:
        raise DatasetError(
            f"{path} holds one object with several lists of rows: choose one with dataset.field={shortened(lists[0])}; "
            f"there are: {there}"
        )
    return lists[0] if lists else None


def _lists(text: _Text, unseen: set[str], path: str = "", depth: int = 0) -> Iterator[str]:
    """Pass over an object, and yield the path of each list of objects in it; the keys that it has leave `unseen`."""
    for key in _keys(text):
        if depth == 0:
            unseen.discard(key)
        here = f"{path}.{key}" if path else key
        if text.peek() == ord("["):
            text.expect(b"[")
            if text.peek() == ord("{"):
                yield here
            text.skip_items()
        elif text.peek() == ord("{") and depth < MAX_DEPTH:
            yield from _lists(text, unseen, here, depth + 1)
        else:
            text.value(keep=False)


def _keys(text: _Text) -> Iterator[str]:
    """Yield the keys of an object; whoever asks passes over their values."""
    text.expect(b"{")
    while text.peek() != ord("}"):
        line, raw = text.line, text.value()
        try:
            key = json.loads(raw.decode("utf-8", "replace"))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {line}: {error.msg} where a key should stand") from None
        text.expect(b":")
        yield str(key)
        if text.peek() != ord("}"):
            text.expect(b",")
    text.expect(b"}")


def _enter(text: _Text, field: str, name: str, path: str = "") -> None:
    """Go to the list that a dotted path names."""
    if text.peek() == ord("{"):
        found = Names()
        for key in _keys(text):
            found.add(path + key)
            if key == field and text.peek() == ord("["):
                return
            if field.startswith(f"{key}.") and text.peek() == ord("{"):
                return _enter(text, field[len(key) + 1 :], name, f"{path}{key}.")
            text.value(keep=False)
        there = f"there are: {found}"
    else:
        there = "its values are in no object"
    raise DatasetError(f"{name} has no list {quoted(path + field)}, as dataset.field= names; {there}")


class _TooLarge(ValueError):
    """A value is larger than may be held; it has been passed over."""

    def __init__(self, line: int, most: int, beginning: bytes) -> None:
        self.beginning = beginning
        super().__init__(f"line {line}: more than the {most / 1e6:g} MB that may stand there (dataset.max_row_mb=)")


class _Text:
    """JSON text of any length, read in blocks; only the current value is held in memory.

    Args:
        file: Where it is read from.
        most: How many bytes of a value are held.
    """

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file = file
        self._most = most
        self._held = b""
        self._at = 0
        self.line = 1
        """The line that the reader has come to."""

    def peek(self) -> int:
        """Pass over blanks and return the next byte, or `_END`."""
        while True:
            match = _BLANKS.match(self._held, self._at)
            assert match is not None
            self._pass(match.end())
            if self._at < len(self._held):
                return self._held[self._at]
            if not self._more():
                return _END

    def expect(self, sign: bytes) -> None:
        """Pass over a sign.

        Raises:
            ValueError: it is another one.
        """
        if self.peek() != sign[0]:
            found = self._held[self._at : self._at + 1].decode("utf-8", "replace")
            where = f"before {found!r}" if found else "at the end"
            raise ValueError(f"line {self.line}: {sign.decode()!r} is missing {where}")
        self._pass(self._at + 1)

    def value(self, keep: bool = True) -> bytes:
        """Pass over the next value, and return it if it is to be kept.

        Raises:
            ValueError: there is none, or it has no end; or, as `_TooLarge`, it is too large to be kept.
        """
        if self.peek() in (ord("{"), ord("[")):
            return self._until_closed(0, keep)
        while True:
            match = _SCALAR.match(self._held, self._at)
            found = match[0] if match else b""
            is_open = not found and self.peek() == ord('"')
            if len(found) > self._most or (is_open and len(self._held) - self._at > self._most):
                error = _TooLarge(self.line, self._most, self._beginning())
                self._pass_scalar()
                if keep:
                    raise error
                return b""
            ends = found and self._at + len(found) < len(self._held)
            if ends or not (found or is_open) or not self._more():
                break
        if not found:
            raise ValueError(f"line {self.line}: no value stands where one should")
        self._pass(self._at + len(found))
        return found

    def skip_items(self) -> None:
        """Pass over the rest of a list that was entered."""
        self._until_closed(1, keep=False)

    def _until_closed(self, depth: int, keep: bool) -> bytes:
        """Pass over all that comes before as many brackets are closed as are open."""
        begun, at = self.line, self._at
        too_large: _TooLarge | None = None
        while True:
            in_string, number = False, 0
            for number, match in enumerate(_TOKEN.finditer(self._held, at)):
                if number == _FEW:
                    break
                sign = match[0]
                at = match.end()
                if sign in b"{[":
                    depth += 1
                elif sign in b"}]":
                    depth -= 1
                    if depth == 0:
                        if keep and at - self._at > self._most:
                            keep, too_large = False, _TooLarge(begun, self._most, self._beginning())
                        value = self._held[self._at : at] if keep else b""
                        self._pass(at)
                        if too_large is not None:
                            raise too_large
                        return value
                elif sign == b'"':  # of a string that ends beyond what is held, if it ends
                    at, in_string = match.start(), True
                    break
            else:
                at = len(self._held)
            if number == _FEW:
                at, depth = self._inside(at, depth)
                continue
            if _BREAK.search(self._held, at):
                line = self.line + self._held.count(b"\n", self._at, at)
                raise ValueError(f"line {line}: a quote is never closed")
            if keep and len(self._held) - self._at > self._most:
                keep, too_large = False, _TooLarge(begun, self._most, self._beginning())
            if not keep:
                self._pass(at)
                if in_string:
                    self._pass_string()
                    at = self._at
                    continue
            at -= self._at
            if not self._more():
                raise ValueError(f"line {begun}: the value that begins there has no end")

    def _inside(self, at: int, depth: int) -> tuple[int, int]:
        """Return up to where no bracket closes the value, as far as blocks can be told at once, and how many are open.

        Args:
            at: Where to begin; not inside of a string.
            depth: How many are open there.
        """
        while (match := _WHOLE.match(self._held, at, at + _BLOCK)) is not None and match.end() > at:
            text = match[0]
            outside = _STRINGS.sub(b"", text) if b"\\" in text else b"".join(text.split(b'"')[::2])  # which is faster
            brackets = np.frombuffer(outside.translate(None, _NO_BRACKETS), np.uint8)
            depths = depth + np.cumsum((brackets & 2).astype(np.int64) - 1)  # of them, only [ and { have that bit
            if depths.min(initial=depth) <= 0:
                break
            at, depth = match.end(), int(depths[-1]) if len(depths) else depth
        return at, depth

    def _beginning(self) -> bytes:
        return self._held[self._at : self._at + KEPT_BYTES]

    def _pass_string(self) -> None:
        """Pass over a string, holding no more than a block of it."""
        line, inside = self.line, self._at + 1
        while True:
            match = _IN_STRING.match(self._held, inside)
            assert match is not None
            self._pass(match.end())
            if self._held[self._at : self._at + 1] == b'"':
                return self._pass(self._at + 1)
            if len(self._held) - self._at > 1:  # more than half of an escape
                raise ValueError(f"line {line}: a quote is never closed")
            if not self._more():
                raise ValueError(f"line {line}: the value that begins there has no end")
            inside = self._at

    def _pass_scalar(self) -> None:
        """Pass over a string, a number or a word, holding no more than a block of it."""
        if self.peek() == ord('"'):
            return self._pass_string()
        while (match := _SCALAR.match(self._held, self._at)) is not None:
            self._pass(match.end())
            if self._at < len(self._held) or not self._more():
                return

    def _pass(self, end: int) -> None:
        self.line += self._held.count(b"\n", self._at, end)
        self._at = end

    def _more(self) -> bool:
        left = self._held[self._at :]
        block = self._file.read(max(_BLOCK, len(left)))  # long values are not copied block by block
        self._held, self._at = left + block, 0
        return bool(block)

"""JSON of any layout: arrays of rows, pretty-printed rows one after another, or a list inside an object.

Of a file of any size, one row at a time is held. Where a row begins and ends is told by its brackets; what it holds is
read by what reads JSONL, with the same exactness, and a row that is wrong inside is an error row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from llmpipe.config import DatasetConfig
from llmpipe.datasets.jsonl import DEFAULTS, row_of
from llmpipe.datasets.opening import open_bytes
from llmpipe.exceptions import DatasetError
from llmpipe.records import Row

HEAD_BYTES = 2**20
"""How much of a file is looked at to tell its layout."""
MAX_DEPTH = 8
"""How deep inside an object a list of rows is looked for."""
_BLOCK = 2**16
_STRING = rb'"[^"\\\r\n]*+(?:\\.[^"\\\r\n]*+)*+"'
_TOKEN = re.compile(_STRING + rb'|[\[\]{}"]')
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
        text = _Text(file)
        if config.field is not None:
            _enter(text, config.field, name)
            yield from _items(text, name)
            return
        while (first := text.peek()) != _END:
            if first == ord("["):
                yield from _items(text, name)
            else:
                yield _row(text, name)


def _items(text: _Text, name: str) -> Iterator[Row]:
    text.expect(b"[")
    while text.peek() != ord("]"):
        yield _row(text, name)
        if text.peek() != ord("]"):
            text.expect(b",")
    text.expect(b"]")


def _row(text: _Text, name: str) -> Row:
    text.peek()
    line, raw = text.line, text.value()
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


def field_of(path: Path, config: DatasetConfig) -> str | None:
    """Return the field of a file's only object that holds the rows; None where the file's values are rows themselves.

    Raises:
        DatasetError: there are several.
    """
    if config.field is not None:
        return config.field
    with open_bytes(path) as file:
        text = _Text(file)
        if text.peek() != ord("{"):
            return None
        keys: list[str] = []
        lists = list(_lists(text, keys))
        if text.peek() != _END or {config.columns.prompt, config.columns.messages} & set(keys):
            return None
    if len(lists) > 1:
        raise DatasetError(
            f"{path} holds one object with several lists of rows: choose one with dataset.field={lists[0]}; "
            f"there are: {', '.join(lists)}"
        )
    return lists[0] if lists else None


def _lists(text: _Text, keys: list[str], path: str = "", depth: int = 0) -> Iterator[str]:
    """Pass over an object, and yield the path of each list of objects in it."""
    for key in _keys(text):
        if depth == 0:
            keys.append(key)
        here = f"{path}.{key}" if path else key
        if text.peek() == ord("["):
            text.expect(b"[")
            if text.peek() == ord("{"):
                yield here
            text.skip_items()
        elif text.peek() == ord("{") and depth < MAX_DEPTH:
            yield from _lists(text, keys, here, depth + 1)
        else:
            text.value(keep=False)


def _keys(text: _Text) -> Iterator[str]:
    """Yield the keys of an object; whoever asks passes over their values."""
    text.expect(b"{")
    while text.peek() != ord("}"):
        key = json.loads(text.value().decode("utf-8", "replace"))
        text.expect(b":")
        yield str(key)
        if text.peek() != ord("}"):
            text.expect(b",")
    text.expect(b"}")


def _enter(text: _Text, field: str, name: str, path: str = "") -> None:
    """Go to the list that a dotted path names."""
    if text.peek() == ord("{"):
        found = []
        for key in _keys(text):
            found.append(key)
            if key == field and text.peek() == ord("["):
                return
            if field.startswith(f"{key}.") and text.peek() == ord("{"):
                return _enter(text, field[len(key) + 1 :], name, f"{path}{key}.")
            text.value(keep=False)
        there = f"there are: {', '.join(path + key for key in found)}"
    else:
        there = "its values are in no object"
    raise DatasetError(f"{name} has no list {path + field!r}, as dataset.field= names; {there}")


class _Text:
    """JSON text of any length, of which no more is held than the value at hand."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._held = b""
        self._at = 0
        self.line = 1
        """Where the reader stands."""

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
            ValueError: there is none, or it has no end.
        """
        if self.peek() in (ord("{"), ord("[")):
            return self._until_closed(0, keep)
        while (match := _SCALAR.match(self._held, self._at)) is not None:
            if (match.end() < len(self._held) and match[0]) or not self._more():
                break
        if match is None or not match[0]:
            raise ValueError(f"line {self.line}: no value stands where one should")
        self._pass(match.end())
        return bytes(match[0])

    def skip_items(self) -> None:
        """Pass over the rest of a list that was entered."""
        self._until_closed(1, keep=False)

    def _until_closed(self, depth: int, keep: bool) -> bytes:
        """Pass over all that comes before as many brackets are closed as are open."""
        begun, at = self.line, self._at
        while True:
            for match in _TOKEN.finditer(self._held, at):
                sign = match[0]
                at = match.end()
                if sign in b"{[":
                    depth += 1
                elif sign in b"}]":
                    depth -= 1
                    if depth == 0:
                        value = self._held[self._at : at] if keep else b""
                        self._pass(at)
                        return value
                elif sign == b'"':  # of a string that ends beyond what is held, if it ends
                    at = match.start()
                    break
            else:
                at = len(self._held)
            if _BREAK.search(self._held, at):
                line = self.line + self._held.count(b"\n", self._at, at)
                raise ValueError(f"line {line}: a quote is never closed")
            if not keep:
                self._pass(at)
            at -= self._at
            if not self._more():
                raise ValueError(f"line {begun}: the value that begins there has no end")

    def _pass(self, end: int) -> None:
        self.line += self._held.count(b"\n", self._at, end)
        self._at = end

    def _more(self) -> bool:
        left = self._held[self._at :]
        block = self._file.read(max(_BLOCK, len(left)))  # long values are not copied block by block
        self._held, self._at = left + block, 0
        return bool(block)

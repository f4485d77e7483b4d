"""Opens text files by what they hold, whatever they are called: packed or not, in UTF-8 or UTF-16."""

from __future__ import annotations

import codecs
import gzip
import io
import string
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llmpipe.exceptions import MissingDependencyError

COMPRESSIONS = (".gz", ".zst")
_GZIP, _ZSTD = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"
_PLAIN = set(string.printable)
_BLOCK = 2**16


def open_bytes(path: Path) -> IO[bytes]:
    """Open a text file for reading as UTF-8 without a byte order mark; what is packed is unpacked on the way.

    Raises:
        MissingDependencyError: the package that unpacks it is not installed.
    """
    with _unpacked(path) as file:
        head = file.read(4)
    file = _unpacked(path)
    if encoding := _utf16(head):
        return io.BufferedReader(_Pieces(_as_utf8(file, encoding), file))
    if head.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
    return file


def blocks_of_lines(file: IO[bytes], most: int) -> Iterator[list[bytes]]:
    """Yield the lines of a file, without their LF, as many at a time as about 128 KiB hold.

    Args:
        file: The file.
        most: Of a line of more bytes, only about so many are held and yielded.
    """
    pieces, size = list[bytes](), 0
    while block := file.read(2 * _BLOCK):
        lines = block.split(b"\n")
        if size <= most:
            pieces.append(lines[0])
            size += len(lines[0])
        if len(lines) > 1:
            lines[0] = b"".join(pieces)
            pieces, size = [lines[-1]], len(lines.pop())
            yield lines
    if size:
        yield [b"".join(pieces)]


def _unpacked(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith(_GZIP) or suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    if head.startswith(_ZSTD) or suffix == ".zst":
        return _zstd(path)
    return path.open("rb")


def _utf16(head: bytes) -> str | None:
    """Return the kind of UTF-16 that a file begins with: with its mark, or with plain letters, as JSON does."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    texts = {encoding: head.decode(encoding, "replace") for encoding in ("utf-16-le", "utf-16-be")}
    return next((name for name, text in texts.items() if len(text) == 2 and set(text) <= _PLAIN), None)


def _as_utf8(file: IO[bytes], encoding: str) -> Iterator[bytes]:
    # Half of a surrogate pair becomes bytes that are no UTF-8, which its row is then told of.
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    while block := file.read(_BLOCK):
        yield decoder.decode(block).encode("utf-8", "surrogatepass")
    yield decoder.decode(b"", final=True).encode("utf-8", "surrogatepass")


def _zstd(path: Path) -> IO[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise MissingDependencyError("zstandard", "zstd", f"reading {path.name}") from error
    file = path.open("rb")
    return io.BufferedReader(_Pieces(_frames(file, zstandard.ZstdDecompressor().decompressobj), file))


def _frames(file: IO[bytes], new_frame: Any) -> Iterator[bytes]:
    """Unpack Zstandard of any number of frames; zstandard's own reader takes one that is cut off for whole."""
    frame: Any = None
    while packed := file.read(512):  # so few that no file, however it was packed, unpacks to more than 16 MB at once
        while packed:
            frame = frame or new_frame()
            yield frame.decompress(packed)
            packed = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends in the middle of a frame")


class _Pieces(io.RawIOBase):
    """A file whose bytes come in pieces of any size."""

    def __init__(self, pieces: Iterator[bytes], file: IO[bytes]) -> None:
        self._pieces, self._file = pieces, file
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()

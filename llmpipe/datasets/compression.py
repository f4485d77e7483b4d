"""Opens text files, compressed or not."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import IO, Any

from llmpipe.exceptions import MissingDependencyError

COMPRESSIONS = (".gz", ".zst")


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading; what a name in `COMPRESSIONS` ends with is unpacked on the way.

    Raises:
        MissingDependencyError: the package that unpacks it is not installed.
    """
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    return io.BufferedReader(_ZstdFile(path)) if suffix == ".zst" else path.open("rb")


class _ZstdFile(io.RawIOBase):
    """Reads a Zstandard file of any number of frames; zstandard's own reader takes one that is cut off for whole."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise MissingDependencyError("zstandard", "zstd", f"reading {path.name}") from error
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._file = path.open("rb")
        self._frame: Any = None
        self._packed, self._plain = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            self._packed = self._packed or self._file.read(4096)
            if not self._packed and self._frame is not None:
                raise EOFError("it ends in the middle of a frame")
            if not self._packed:
                return 0
            self._frame = self._frame or self._new_frame()
            self._plain, self._packed = memoryview(self._frame.decompress(self._packed)), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._plain))
        buffer[:size], self._plain = self._plain[:size], self._plain[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()

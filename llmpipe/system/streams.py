"""The standard streams of the command, whatever they are: closed, of an encoding that lacks characters, full, unread.

A run is worth more than what is said of it, so nothing that is printed can end one. What a reader who has left
(`| head -1`), a full disk, or a terminal that is gone does not take is dropped; characters that an encoding lacks are
written in others. A stream that was closed before the start leads nowhere, and leaves no number free that a file of the
run would get, for other programs' words to land in.
"""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TextIO

SPELT_OUT = "llmpipe.spelt_out"
"""The name of the way, for encoders, in which missing characters are written."""
PLAIN = {"…": "...", "→": "->", "–": "-", "—": "-", "─": "-", "━": "-", "█": "#", "×": "x", "µ": "u", "·": "."}
PLAIN |= dict.fromkeys("‘’", "'") | dict.fromkeys("“”", '"')


class Outlet(io.FileIO):
    """A file descriptor that drops what it cannot write; `lost` is the reason, such as a full disk."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        """Write some bytes, or drop them."""
        try:
            while (written := super().write(data)) is None:  # whoever started us has made it one that does not wait
                select.select([], [self], [])
            return written
        except OSError as error:
            if not isinstance(error, BrokenPipeError):  # whose reader has seen enough
                self.lost = error
            return memoryview(data).nbytes


@contextmanager
def usable_streams() -> Iterator[None]:
    """Make the standard streams usable for a while.

    Those that are usable already, and what another program put in their place, are left as they are.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # that is how Python shows a closed one
            setattr(sys, name, _nowhere(number, "r" if name == "stdin" else "w"))
    sys.stdout, sys.stderr = _outlet(sys.stdout), _outlet(sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if sys.stdout is not before[1] and (error := lost()):
            print(f"llmpipe: the standard output could not be written: {error.strerror}", file=sys.stderr)
        sys.stdin, sys.stdout, sys.stderr = before


def lost() -> OSError | None:
    """Return why something that was printed is lost to one who wanted it; None where nothing is."""
    sys.stdout.flush()
    return getattr(_raw(sys.stdout), "lost", None)


def _nowhere(number: int, mode: Literal["r", "w"]) -> TextIO:
    """Open the null device, under a number that is free; elsewhere where a library has opened something there."""
    null = os.open(os.devnull, os.O_RDWR)
    try:
        os.fstat(number)
    except OSError:
        os.dup2(null, number)
        os.close(null)
        null = number
    os.set_inheritable(null, null == number)  # as what stands there would be, for the processes of a sweep
    return open(null, mode, encoding="utf-8", closefd=False)


def _outlet(stream: TextIO) -> TextIO:
    """Return the same stream, on an `Outlet`; a console of Windows, or what a program put in its place, as it is."""
    if type(stream) is not io.TextIOWrapper or type(_raw(stream)) is not io.FileIO:
        return stream
    stream.flush()
    outlet = Outlet(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(outlet) if stream.buffer is not _raw(stream) else outlet,
        encoding=stream.encoding,
        errors=SPELT_OUT,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _raw(stream: Any) -> Any:
    """Return what a stream writes to at last; None where it is no stream of the system."""
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)  # with `python -u` there is no buffer between


def _spelt_out(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    spelt_out = (PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in missing)
    return "".join(spelt_out), error.end


codecs.register_error(SPELT_OUT, _spelt_out)

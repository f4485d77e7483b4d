"""Reading a text where the stack is deep enough for it.

llama.cpp splits texts by regular expressions of the C++ library, which recurse once for every character they match:
26,000 letters without a space end a process whose stack has 8 MB. Knows nothing of tokens.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import psutil

T = TypeVar("T")

BYTES_PER_CHARACTER = 1024
"""Stack that a character may take: three times what was measured, as compilers differ."""
SHALLOW = 1000
"""Characters that every stack has room for, also those of 1 MB that threads have on some systems."""
ROOM_BYTES = 1 << 20
"""Stack for everything else."""

_STRETCH = re.compile(r"[^\n]+\s*|\s+")
_starting = threading.Lock()


def reading(text: str, read: Callable[[], T]) -> T:
    """Return what `read` returns, which reads `text`: here, or on a thread with a stack for all of the text.

    A thread is made for each long text. That takes 40 µs and no memory but what is used of its stack, which is given
    back at once, and there is nothing that a fork could lose.

    Raises:
        ValueError: there is no stack for the text; says why.
    """
    if len(text) <= SHALLOW:
        return read()
    free = psutil.virtual_memory().available
    for depth in (len(text), longest_stretch(text)):
        if depth <= SHALLOW:
            return read()
        stack_bytes = depth * BYTES_PER_CHARACTER + ROOM_BYTES
        if stack_bytes > free:
            continue
        future: Future[T] = Future()
        thread = threading.Thread(target=_settle, args=(future, read), name="llmpipe-deep", daemon=True)
        if _start(thread, stack_bytes):
            try:
                thread.join()
            finally:  # after Ctrl-C, too: nothing may be freed that the thread still reads
                thread.join()
            return future.result()
    raise ValueError(
        f"the text has {depth} characters without a line break: to read them may take a stack of "
        f"{stack_bytes // 2**20} MiB, and there is less memory (see ulimit -v); break its lines, or use a shorter text"
    )


def longest_stretch(text: str) -> int:
    """Return the length of the longest line with the white space after it: no expression matches more at once."""
    return max((match.end() - match.start() for match in _STRETCH.finditer(text)), default=0)


def _start(thread: threading.Thread, stack_bytes: int) -> bool:
    """Start a thread with a stack of its own size; say whether the system gave it one."""
    with _starting:  # the size is the whole process's
        before = threading.stack_size(-(-stack_bytes // ROOM_BYTES) * ROOM_BYTES)
        try:
            thread.start()
        except RuntimeError:
            return False
        finally:
            threading.stack_size(before)
    return True


def _settle(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)

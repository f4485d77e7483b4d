"""The memory that a process holds, the most that it has held, and what of it can be given back."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Callable
from typing import Self

import psutil


def own_rss_bytes() -> int:
    """Return the resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def give_back() -> None:
    """Free what nobody refers to any more, and give what is free back to the system."""
    gc.collect()
    trim()


def trim() -> None:
    """Give what is free back to the system: glibc's allocator keeps what lies below something that is in use."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if malloc_trim is not None:
        malloc_trim(0)


class MemorySampler:
    """Watches resident memory, at first that of this process, from a thread of its own, while its `with` block runs.

    What was freed before the block is given back first, so that the peak is the block's own, on top of what the
    process still holds.

    Args:
        interval_s: Seconds between two looks; a peak that is shorter may be missed.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._rss_bytes: Callable[[], int] = own_rss_bytes
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llmpipe-memory", daemon=True)
        self._peak_bytes = 0

    def watch(self, rss_bytes: Callable[[], int]) -> None:
        """Ask that from now on, such as a runner whose model may be in another process."""
        self._rss_bytes = rss_bytes

    @property
    def peak_rss_mb(self) -> float:
        """Most resident memory seen so far, in MB (10^6 bytes)."""
        self._look()
        return self._peak_bytes / 1e6

    def __enter__(self) -> Self:
        trim()
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        self._peak_bytes = max(self._peak_bytes, self._rss_bytes())

    def _run(self) -> None:
        while not self._over.wait(self._interval_s):
            self._look()

"""The memory that a process holds, and the most that it has held."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Self

import psutil


def own_rss_bytes() -> int:
    """Return the resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


class MemorySampler:
    """Watches the resident memory of this process from a thread of its own, while its `with` block runs.

    Args:
        interval_s: Seconds between two looks; a peak that is shorter may be missed.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self.rss_bytes: Callable[[], int] = own_rss_bytes
        """What is watched: this process, unless its user knows of others."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="llmpipe-memory", daemon=True)
        self._peak_bytes = 0

    @property
    def peak_rss_mb(self) -> float:
        """Most resident memory seen so far, in MB (10^6 bytes)."""
        self._look()
        return self._peak_bytes / 1e6

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        self._peak_bytes = max(self._peak_bytes, self.rss_bytes())

    def _watch(self) -> None:
        while not self._over.wait(self._interval_s):
            self._look()

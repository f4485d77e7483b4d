"""CPU threads: how many compute beside whatever else the machine does, and how they wait for each other.

A step is hundreds of small computations, at the end of each of which all threads wait for the last. Where another
process keeps one of them from running, the others wait for it hundreds of times: fewer threads are faster then, and
threads that sleep while they wait leave it their processors.
"""

from __future__ import annotations

import logging
import os
import sys
import time

from llmpipe import machine
from llmpipe.config import BackendConfig
from llmpipe.runners.batching import sizing

log = logging.getLogger(__name__)

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables by which OpenMP is told how to wait."""
BRIEFLY = {"GOMP_SPINCOUNT": "60000", "KMP_BLOCKTIME": "2"}
"""Some two milliseconds of waiting awake, for GNU's OpenMP and for LLVM's, whose own defaults are about 10 and 200.

That is longer than what a thread alone does between two computations, and shorter than the turn of another process.
"""
LOOK_EVERY_S = 0.5


def wait_briefly() -> None:
    """Let threads that wait for others sleep soon; a user's own choice stands.

    OpenMP reads its variables once, when it is loaded: to be called before a package is imported that brings it.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ.update(BRIEFLY)


class Threads:
    """How many threads compute: all that this process may use, or as many as others leave processors for.

    At least half of them: where others want all processors, giving way further would only give away a fair share.
    Set by hand they stand, and in reproducible mode they are always the same, as sums are split among them.

    Args:
        config: The backend's options.
        most: What bounds them, unless they are set by hand.
    """

    def __init__(self, config: BackendConfig, most: int = sys.maxsize) -> None:
        found = sizing.threads(config)
        self.most = found if config.threads else min(found, most)
        self.now = self.most
        """How many compute now."""
        self._adapts = config.threads is None and not config.reproducible and self.most > 1
        self._fewest = self.most
        self._room, self._looked = machine.Room(), time.monotonic()

    def look(self) -> int:
        """Return how many threads should compute next; looks at the processors once in a while."""
        if self._adapts and time.monotonic() - self._looked >= LOOK_EVERY_S:
            self._looked = time.monotonic()
            if (room := self._room.look()) is not None:
                self.now = beside(room, self.most)
            if self.now < self._fewest:
                self._fewest = self.now
                log.info("threads: %d of %d, as other processes leave %.1f processors", self.now, self.most, room)
        return self.now


def beside(room: float, most: int) -> int:
    """Return how many of at most `most` threads should compute where others leave so many processors."""
    return max(-(-most // 2), min(most, int(room + 0.5)))

"""CPU threads: how many compute beside whatever else the machine does.

A step is hundreds of small computations, at the end of each of which all threads wait for the last. Where another
process keeps one of them from running, the others wait for it hundreds of times: they had better sleep meanwhile, so
that it has their processors. Threads that cannot be told to sleep are made fewer instead.
"""

from __future__ import annotations

import logging
import sys
import time

from llmpipe.config import BackendConfig
from llmpipe.runners import openmp
from llmpipe.runners.batching import sizing
from llmpipe.system import machine

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5


class Threads:
    """How many threads compute: all that this process may use, if they can sleep while they wait for each other.

    Else as many as others leave processors for; at least half of them, as giving way further would only give away a
    fair share. Set by hand they stand, and in reproducible mode they are always the same: sums are split among them.

    Args:
        config: The backend's options.
        most: What bounds them, unless they are set by hand.
    """

    def __init__(self, config: BackendConfig, most: int = sys.maxsize) -> None:
        found = sizing.threads(config)
        self.most = self.now = found if config.threads else min(found, most)
        """How many may compute, and how many do now."""
        self._stay = config.threads is not None or config.reproducible
        self._gave_way = False
        self._room, self._look_at = machine.Room(), 0.0

    def look(self) -> int:
        """Return how many threads should compute next; looks at the processors once in a while."""
        if self.most > 1 and time.monotonic() >= self._look_at and (room := self._room.look()) is not None:
            self._look_at = time.monotonic() + LOOK_EVERY_S
            self._give_way(room)
        return self.now

    def _give_way(self, room: float) -> None:
        """Give way to others where they leave less than all processors."""
        fitting = beside(room, self.most)
        sleeping = openmp.sleep_at_once(fitting < self.most, self.most)
        self.now = self.most if sleeping or self._stay else fitting
        if fitting < self.most and (sleeping or not self._stay) and not self._gave_way:
            self._gave_way = True
            log.info("threads: %d that give way to other processes, which leave %.1f processors", self.now, room)


def beside(room: float, most: int) -> int:
    """Return how many of at most `most` threads should compute where others leave so many processors."""
    return max(-(-most // 2), min(most, int(room + 0.5)))

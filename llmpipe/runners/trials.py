"""Files that were never loaded here are tried in a process of their own, within limits; what came of it is remembered.

A file made for it, or damaged, can make native code end its process, fill the memory, or go on for ever. What was tried
with success is known by the files' places, sizes and times, so that it is tried once and not for every run.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmpipe.exceptions import LLMInitializationError
from llmpipe.runners.digests import State
from llmpipe.runners.isolated import IsolatedRunner
from llmpipe.runners.weights import BUNDLED_DIR

LEAST_S = 60.0
"""How long any trial may take; usual is a second."""
BYTES_PER_S = 20 * 2**20
"""How slowly large files may be read."""
LEAST_BYTES = 4 * 2**30
"""How much memory any trial may take."""
TALKERS = ("llmpipe.runners", "llmpipe.llama_cpp")
"""The loggers of what runs in a trial."""


class Trial:
    """One set of files, under the circumstances (versions, options) that decide whether they load.

    Args:
        files: All that is read.
        circumstances: What else makes it another trial: versions, options.
        growth: How much memory a byte of the files may take.
    """

    def __init__(self, files: Iterable[Path], circumstances: object, growth: int) -> None:
        self.files = list(files)
        states = [(str(file.resolve()), State.of(file)) for file in self.files]
        size = sum(state.written[1] for _, state in states)
        self.most_s = LEAST_S + size / BYTES_PER_S
        self.most_bytes = LEAST_BYTES + growth * size
        facts = [(file, state.place, state.written, state.changed_ns) for file, state in states]
        digest = hashlib.sha256(repr((facts, circumstances)).encode()).hexdigest()
        try:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        except RuntimeError:  # an unknown user, who has no home
            cache = Path(os.devnull)  # no file can be made below it, so nothing is remembered
        self._memory = cache / "llmpipe" / "loaded" / digest[:32]

    @property
    def is_needed(self) -> bool:
        """Whether the files may be anybody's; and without processes of their own (Windows), better a risk than none."""
        return os.name == "posix" and any(file.parent != BUNDLED_DIR for file in self.files)

    def recall(self) -> str | None:
        """Return the outcome of the trial; None where it was never made, or failed."""
        try:
            return self._memory.read_text(encoding="ascii")
        except (OSError, ValueError):
            return None

    def remember(self, outcome: str) -> None:
        """Keep the outcome of a trial that succeeded."""
        with suppress(OSError):  # then it is tried again
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            self._memory.write_text(outcome, encoding="ascii")


@contextmanager
def quietly() -> Iterator[None]:
    """Show log lines of a trial only where details are asked for: its sizes and restarts are not those of a run."""
    loggers = [logging.getLogger(name) for name in TALKERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        if not logger.isEnabledFor(logging.DEBUG):
            logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class TrialRunner(IsolatedRunner):
    """A runner in another process, with no more time and memory to load and to answer than a trial may take.

    Args:
        trial: The trial.
        *args: As in `IsolatedRunner`.
        **options: As in `IsolatedRunner`.
    """

    def __init__(self, trial: Trial, *args: Any, **options: Any) -> None:
        self._trial = trial
        self._until = time.monotonic() + trial.most_s
        super().__init__(*args, **options)

    def tick(self) -> None:
        """Look at the clock.

        Raises:
            LLMInitializationError: the time is over.
        """
        if self._child is not None:
            limit_memory(self._child.pid, self._trial.most_bytes)
        if time.monotonic() > self._until:
            raise LLMInitializationError(f"it does not come to an end within {self._trial.most_s:.0f} s")
        super().tick()


def limit_memory(pid: int, most_bytes: int) -> None:
    """Let a process have no more memory of its own than that; only Linux can."""
    if sys.platform == "linux":
        import resource

        with suppress(OSError):  # it has ended
            resource.prlimit(pid, resource.RLIMIT_DATA, (most_bytes, most_bytes))

"""What ends a run before its dataset does: a signal, too many errors, its time limit. Each can be resumed.

Whoever drives a runner asks at every step whether to go on. A step may take long, though: a large model computes many
tokens at once, somebody's backend waits for a server. So a thread watches as well, and ends a step that goes on after
the end: it asks the runner to give up, and raises `WaitingIsOver` in the main thread, as Ctrl-C raises.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, Self

from llmpipe.config import OnError, RunConfig
from llmpipe.datasets import Dataset
from llmpipe.exceptions import LLMInferenceError, RunInterrupted, RunStopped
from llmpipe.quoting import how_to_resume
from llmpipe.records import Completion
from llmpipe.system.signals import SIGNALS, TWICE, heeded

log = logging.getLogger(__name__)

RATED_FROM = 100
"""Rows that must have been asked for before their error rate means anything."""
NUDGE: int | None = getattr(signal, "SIGURG", None)
"""The signal that wakes the main thread; nobody else sends it, and by default it does nothing. Windows has none."""
GRACE_S = 0.5
"""How long a step may go on once the run is to end."""
YIELD_S = 0.1
"""How long a runner that was asked to give up its step may take; then it is not asked."""


class WaitingIsOver(BaseException):
    """The run is to end now; nothing that is under way is waited for.

    It is no `Exception`, because a backend may catch every `Exception` and go on.
    """


class Stops:
    """Watches one attempt at a run, while its `with` block lasts.

    The first of `SIGNALS` is a wish to stop; a second one, unless of those that come `TWICE`, ends the process at once.

    Args:
        config: The run.
        rows: How many there are.
    """

    def __init__(self, config: RunConfig, rows: int) -> None:
        self._config = config
        self._rated_from = min(RATED_FROM, rows)
        self._until = math.inf
        self._received: int | None = None
        self.begun = self._errors = 0
        self._failed = bytearray(rows)
        """For each row, whether one of its answers is an error."""
        self._last_error: Completion | None = None
        self._over = False
        """Whether the time limit has been found to be over; remembered, so that the reason is told at the end."""
        self._interrupt: Callable[[], None] | None = None
        """Makes the runner give up its step; None where nothing is to be interrupted."""
        self._interrupted = False
        """Whether the thread has asked for that: what the runner then raises is no fault of its own."""
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if self._config.run_timeout_s is not None:
            self._until = time.monotonic() + self._config.run_timeout_s
        # Python runs a signal's handler in the main thread, once native code returns there; but as the signal comes, it
        # writes its number to the wakeup descriptor. So the thread, which listens at the bell, hears it in a long step.
        self._bell, self._cord = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="llmpipe-stops", daemon=True)
        self._thread.start()
        if threading.current_thread() is threading.main_thread():  # elsewhere Python delivers no signals
            for signum in heeded():
                self._handlers[signum] = signal.signal(signum, self._on_signal)
            if NUDGE is not None:
                self._handlers[NUDGE] = signal.signal(NUDGE, self._on_nudge)
            self._cord.setblocking(False)
            self._cord_before = signal.set_wakeup_fd(self._cord.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._handlers:
            signal.set_wakeup_fd(self._cord_before)
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._cord.close()
        self._thread.join()
        self._bell.close()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received = signum
            log.warning("stopping after %s; once more to stop at once", signal.Signals(signum).name)
        elif signum not in TWICE:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    # --- counting -------------------------------------------------------------------------------------------------

    def recall(self, rows: int, errors: Iterable[Completion]) -> None:
        """Count what earlier attempts did, for the error rate; an error that stopped one of them stops no other.

        Args:
            rows: How many have answers.
            errors: The answers that are errors; looked at only where they count.
        """
        self.begun += rows
        if self._config.max_error_rate is not None and self._config.on_error is not OnError.stop:
            for completion in errors:
                self.note(completion)

    def asked(self) -> None:
        """Count a row that is begun; until it fails it is good, so that no early error is given undue weight."""
        self.begun += 1

    def note(self, completion: Completion) -> None:
        """Count an answer that is an error."""
        if completion.error is not None:
            self._errors += not self._failed[completion.request_id]
            self._failed[completion.request_id] = True
            self._last_error = completion

    def _too_many_errors(self) -> bool:
        if self._config.on_error is OnError.stop:
            return self._errors > 0
        if self._config.max_error_rate is None or self.begun < self._rated_from:
            return False
        return self._errors > self._config.max_error_rate * self.begun

    # --- ending ---------------------------------------------------------------------------------------------------

    def pulls_no_more(self) -> bool:
        """Say whether no further row is to be begun."""
        self._over = self._over or time.monotonic() > self._until
        return self._over or self._received is not None or self._too_many_errors()

    def check(self) -> None:
        """Go on, or not.

        Raises:
            WaitingIsOver: not.
        """
        if self.pulls_no_more():
            self._interrupt = None  # this will do
            raise WaitingIsOver

    @contextmanager
    def watching(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """See to it that what happens inside ends in time even if it does not `check` for a while.

        Args:
            interrupt: Called from another thread; makes a runner give up its step, where it can.

        Raises:
            WaitingIsOver: it was ended; whatever it then raised, too.
        """
        self._interrupt = interrupt
        try:
            yield
        except Exception as error:
            if self._interrupted:
                self.pulls_no_more()  # for the reason why
                raise WaitingIsOver from error
            raise
        finally:
            self._interrupt = None

    def _watch(self) -> None:
        """Wait for the time limit or a signal; interrupt what is then still under way, again and again."""
        over_since, wishes = self._until, list[int]()
        while True:
            wait_s = over_since + GRACE_S - time.monotonic()
            if wait_s <= 0:
                self._end_step()
                over_since, wait_s = time.monotonic(), GRACE_S
            self._bell.settimeout(min(wait_s, 3600))
            try:
                heard = self._bell.recv(64)
            except TimeoutError:
                continue
            if not heard:
                return
            for signum in heard:
                if signum in SIGNALS and (signum not in TWICE or not wishes):
                    wishes.append(signum)
            if wishes:
                over_since = min(over_since, time.monotonic())
            if len(wishes) > 1:  # the main thread ends the process, unless it is held up in native code
                time.sleep(GRACE_S)
                os._exit(128 + wishes[-1])

    def _end_step(self) -> None:
        interrupt = self._interrupt
        if interrupt is None:
            return
        self._interrupted = True
        interrupt()
        time.sleep(YIELD_S)
        if self._interrupt is not None and NUDGE in self._handlers:
            signal.pthread_kill(threading.main_thread().ident, NUDGE)  # type: ignore[arg-type]

    def _on_nudge(self, signum: int, frame: FrameType | None) -> None:
        if self._interrupt is not None and not _is_called_by_native_code(frame):  # then the next nudge will do
            self.pulls_no_more()  # for the reason why
            self._interrupt = None  # once is enough: what cleans up is left in peace
            raise WaitingIsOver

    def raise_if_stopped(self, directory: Path, dataset: Dataset) -> None:
        """Tell why the run ended, if it was not for the end of the dataset.

        Raises:
            RunInterrupted: a signal came.
            RunStopped: there were too many errors; names the last one by file and line.
            LLMInferenceError: the time was over.
        """
        if self._received is not None:
            raise RunInterrupted(directory, self._received)
        if self._too_many_errors():
            raise self._verdict(directory, dataset)
        if self._over:
            limit = self._config.run_timeout_s
            raise LLMInferenceError(f"run_timeout_s={limit} is over; continue with: {how_to_resume(directory)}")

    def _verdict(self, directory: Path, dataset: Dataset) -> RunStopped:
        assert self._last_error is not None
        row = next(islice(dataset.rows(), self._last_error.request_id, None))
        last = f"{row.file} line {row.line}: {self._last_error.error}"
        if self._config.on_error is OnError.stop:
            return RunStopped(directory, f"on_error=stop, and there is an error: {last}")
        why = f"{self._errors} of {self.begun} rows are errors, over max_error_rate={self._config.max_error_rate}"
        return RunStopped(directory, f"{why}; the last: {last}", "max_error_rate=null")


def _is_called_by_native_code(frame: FrameType | None) -> bool:
    """Say whether native code, which drops exceptions, waits for what runs in a frame."""
    while frame is not None:
        if frame.f_globals.get("CALLED_BY_NATIVE_CODE"):
            return True
        frame = frame.f_back
    return False

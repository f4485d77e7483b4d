"""What ends a run before its dataset does: a signal, too many errors, its time limit. Each can be resumed."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, Self

from llmpipe.config import OnError, RunConfig
from llmpipe.datasets import Dataset
from llmpipe.exceptions import LLMInferenceError, RunInterrupted, RunStopped
from llmpipe.records import Completion

log = logging.getLogger(__name__)

HANGUP = getattr(signal, "SIGHUP", None)
"""Comes when the terminal is closed; Windows has none."""
SIGNALS = [signum for signum in (signal.SIGINT, signal.SIGTERM, HANGUP) if signum is not None]

RATED_FROM = 100
"""Answers that must have been asked for before their error rate means anything."""


class WaitingIsOver(Exception):
    """Nothing that is under way is waited for any longer."""


class Stops:
    """Watches one attempt at a run, while its `with` block lasts.

    The first SIGINT, SIGTERM or SIGHUP is a wish to stop; a second one ends the process at once.

    Args:
        config: The run.
        rows: How many there are.
    """

    def __init__(self, config: RunConfig, rows: int) -> None:
        self._config = config
        self._rated_from = min(RATED_FROM, rows)
        self._until = math.inf if config.run_timeout_s is None else time.monotonic() + config.run_timeout_s
        self._received: int | None = None
        self._handlers: dict[int, Any] = {}
        self._asked = self._errors = 0
        self._last_error: Completion | None = None
        self._over = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python delivers no signals
            for signum in SIGNALS:
                if signum == HANGUP and signal.getsignal(signum) is signal.SIG_IGN:
                    continue  # by nohup: the run is to outlive its terminal
                self._handlers[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received = signum
            log.warning("stopping after %s; once more to stop at once", signal.Signals(signum).name)
        elif signum != HANGUP:  # a terminal that is closed says so twice: by itself, and through the shell
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    def asked(self, answers: int) -> None:
        """Count answers that are asked for; until they come they are good, so no early error is given undue weight."""
        self._asked += answers

    def note(self, completion: Completion) -> None:
        """Count an answer."""
        if completion.error is not None:
            self._errors += 1
            self._last_error = completion

    def pulls_no_more(self) -> bool:
        """Say whether no further row is to be begun."""
        return self._received is not None or self._too_many_errors()

    def check(self) -> None:
        """Go on, or not.

        Raises:
            WaitingIsOver: not.
        """
        if self.pulls_no_more() or time.monotonic() > self._until:
            self._over = True
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
            raise RunStopped(directory, self._verdict(dataset))
        if self._over:
            limit = self._config.run_timeout_s
            raise LLMInferenceError(f"run_timeout_s={limit} is over; continue with: llmpipe resume={directory}")

    def _too_many_errors(self) -> bool:
        if self._config.on_error is OnError.stop:
            return self._errors > 0
        if self._config.max_error_rate is None or self._asked < self._rated_from:
            return False
        return self._errors > self._config.max_error_rate * self._asked

    def _verdict(self, dataset: Dataset) -> str:
        assert self._last_error is not None
        row = next(islice(dataset.rows(), self._last_error.request_id, None))
        last = f"{row.file} line {row.line}: {self._last_error.error}"
        if self._config.on_error is OnError.stop:
            return f"on_error=stop, and there is an error: {last}"
        rate = self._config.max_error_rate
        return f"{self._errors} of {self._asked} answers are errors, over max_error_rate={rate}; the last: {last}"

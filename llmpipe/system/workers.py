"""Jobs of a sweep in processes of their own, as the launcher joblib makes them: they end with the command, in order.

The command passes a signal on, waits until each job has committed what it finished, and then ends. However it ends
otherwise, the workers notice, and stop as they would after a signal: none goes on, and none begins the next job.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from llmpipe.system.signals import SIGNALS, TWICE, heeded

PR_SET_PDEATHSIG = 1
LOOK_EVERY_S = 0.5
"""How often a worker looks whether the command is still there."""
LEAVE_S = 5.0
"""How long a worker may take to end in order."""

_handlers: dict[int, Any] = {}
"""Handlers that were there before `passing_on`, by their signals."""


class Signalled(KeyboardInterrupt):
    """A signal ended the command outside of a run.

    Args:
        signum: The signal.
    """

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(signum)


@contextmanager
def passing_on() -> Iterator[None]:
    """Pass signals on to the workers, if there are any, and raise `Signalled` once they have ended.

    Only for the main thread; elsewhere Python delivers no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    for signum in heeded():
        _handlers[signum] = signal.signal(signum, _on_signal)
    try:
        yield
    finally:
        _put_back()
        _handlers.clear()


@contextmanager
def in_this_process() -> Iterator[None]:
    """Leave signals to a job that runs here: native code, as in loading a model, keeps Python from handling any."""
    _put_back()
    try:
        yield
    finally:
        for signum in _handlers:
            signal.signal(signum, _on_signal)


def _put_back() -> None:
    for signum, handler in _handlers.items():
        signal.signal(signum, handler)


def _on_signal(signum: int, frame: FrameType | None) -> None:
    import psutil

    for number in _handlers:
        signal.signal(number, signal.SIG_DFL)  # a second one ends the command at once
    workers = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "resource_tracker" not in " ".join(child.cmdline()):  # joblib's, which ends after all others
                child.terminate()
                workers.append(child)
    psutil.wait_procs(workers, timeout=LEAVE_S)
    raise Signalled(signum)


# --- in a worker ------------------------------------------------------------------------------------------------------

_command: int | None = None
"""The process of the command, in a worker."""


def is_worker() -> bool:
    """Say whether this process is a worker."""
    return _command is not None


def become_worker(command: int) -> None:
    """Leave signals to the command, and end with it. Does no harm when called again, as for each job.

    Args:
        command: Its process; it must have started this one.
    """
    global _command
    if _command is not None or multiprocessing.current_process().name == "MainProcess":
        return  # the latter is another launcher's, which has its own ways
    _command = command
    with suppress(OSError):
        os.setsid()  # the terminal's Ctrl-C goes to the command alone
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_DFL)
    TWICE.add(signal.SIGTERM)  # from the command, and from whoever sent one to all processes
    if sys.platform == "linux":  # at once, and also where native code never lets Python run
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    threading.Thread(target=_watch, name="llmpipe-command", daemon=True).start()


def _watch() -> None:
    import psutil

    while os.getppid() == _command and psutil.pid_exists(_command):
        time.sleep(LOOK_EVERY_S)
    signal.raise_signal(signal.SIGTERM) if os.name == "nt" else os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LEAVE_S)
    os._exit(1)

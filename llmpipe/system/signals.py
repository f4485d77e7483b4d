"""The signals that ask llmpipe to end."""

from __future__ import annotations

import signal

HANGUP = getattr(signal, "SIGHUP", None)
"""Comes when the terminal is closed; Windows has none."""
SIGNALS = [signum for signum in (signal.SIGINT, signal.SIGTERM, HANGUP) if signum is not None]
TWICE = {HANGUP}
"""Signals that come twice for one wish: of a closed terminal both the kernel and the shell tell."""


def heeded() -> list[int]:
    """Return those to be handled: all, but that nohup has a hangup ignored, so that a run outlives its terminal.

    A shell that starts a command in the background has Ctrl-C ignored, for it is not meant; one that is sent to it is.
    """
    return [signum for signum in SIGNALS if signum != HANGUP or signal.getsignal(signum) is not signal.SIG_IGN]

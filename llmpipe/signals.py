"""The signals that ask llmpipe to end."""

from __future__ import annotations

import signal

HANGUP = getattr(signal, "SIGHUP", None)
"""Comes when the terminal is closed; Windows has none."""
SIGNALS = [signum for signum in (signal.SIGINT, signal.SIGTERM, HANGUP) if signum is not None]
TWICE = {HANGUP}
"""Those that come twice for one wish: a terminal that is closed says so by itself, and through the shell."""

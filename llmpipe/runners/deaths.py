"""How a child process died, and so whether what ran in it may be to blame."""

from __future__ import annotations

import signal

FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
"""Signals that no fault of the code that runs is answered with."""


class ChildDied(Exception):
    """What runs in the child ended it; the text says how, such as `crashed the backend (signal 11, SIGSEGV)`."""


class ChildHung(ChildDied):
    """The parent killed it, because it had sent nothing for `backend.row_timeout_s`."""


class ChildStarved(ChildDied):
    """The kernel killed it, because the machine or its control group had no memory left."""


class ChildKilled(ChildDied):
    """A signal that only people and other programs send ended it: no row is to blame."""


def death_of(code: int | None, starved: bool) -> ChildDied:
    """Return what a process died of.

    Args:
        code: Its exit code, or the negative number of the signal that ended it; None if it lives on.
        starved: Whether the kernel has killed a process for want of memory since it was started.
    """
    if code is None:
        return ChildDied("cut the backend off")
    if code >= 0:
        return ChildDied(f"ended the backend's process (exit code {code})")
    name = next((known.name for known in signal.Signals if known == -code), "without a name")
    if name == "SIGKILL" and starved:
        return ChildStarved(f"ran the machine out of memory: the system ended the backend (signal {-code}, {name})")
    if name in FROM_OUTSIDE:
        return ChildKilled(f"was ended by a kill from outside (signal {-code}, {name})")
    return ChildDied(f"crashed the backend (signal {-code}, {name})")

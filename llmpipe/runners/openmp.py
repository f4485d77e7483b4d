"""How the threads of OpenMP wait for each other: awake for a moment, or asleep where others want the processors.

Awake they are soon back at work, asleep they leave their processor to whoever they wait for.
"""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import suppress
from pathlib import Path

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Environment variables that tell OpenMP, when it is loaded, how its threads wait."""
BRIEFLY = {"GOMP_SPINCOUNT": "120000", "KMP_BLOCKTIME": "5"}
"""Some five milliseconds awake, for GNU's OpenMP and for LLVM's, whose own defaults are about 10 and 200.

Less costs speed where nobody else wants the processors: what one thread does alone between two steps is no longer.
"""

_leave: threading.Event | None = None
"""Ends the thread that makes GNU's OpenMP count more threads than processors; None while there is no such thread."""


def wait_briefly() -> None:
    """Let threads sleep after a moment of waiting; a user's own choice stands.

    To be called before a package is imported that brings OpenMP.
    """
    if not any(name in os.environ for name in VARIABLES):
        os.environ.update(BRIEFLY)


def sleep_at_once(wanted: bool, threads: int) -> bool:
    """Let threads sleep as soon as they wait, or no longer; return whether this OpenMP can be told.

    GNU's stays awake for but 100 rounds as long as it has more threads than there are processors (its manual, under
    GOMP_SPINCOUNT). So a thread is started that has it make as many as are missing, and all of them sleep.

    Args:
        wanted: Whether they should.
        threads: How many compute.
    """
    global _leave
    libraries = _gnu_libraries() if os.environ.get("GOMP_SPINCOUNT") == BRIEFLY["GOMP_SPINCOUNT"] else []
    if libraries and wanted and _leave is None:
        _leave = threading.Event()
        threading.Thread(target=_crowd, args=(libraries, threads, _leave), name="llmpipe-openmp", daemon=True).start()
    elif not wanted and _leave is not None:
        _leave.set()  # a thread that ends takes those with it that it made
        _leave = None
    return bool(libraries)


def _crowd(libraries: list[ctypes.CDLL], threads: int, leave: threading.Event) -> None:
    for library in libraries:
        # The threads run a function without effect: that there are so many of them is all that is wanted.
        nothing = ctypes.cast(library.omp_get_level, ctypes.c_void_p)
        missing = max(0, library.omp_get_num_procs() - threads) + 1
        library.GOMP_parallel(nothing, None, 1 + missing, 0)
    leave.wait()


def _gnu_libraries() -> list[ctypes.CDLL]:
    """Return GNU's OpenMP as it is loaded here: packages may bring one each."""
    lines: list[str] = []
    with suppress(OSError):  # there is none but on Linux, and where processes may look at themselves
        lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    found = []
    for path in sorted({"/" + line.partition("/")[2] for line in lines if "/libgomp" in line}):
        with suppress(OSError):  # it is there no longer
            found.append(ctypes.CDLL(path))
    return [library for library in found if hasattr(library, "GOMP_parallel")]

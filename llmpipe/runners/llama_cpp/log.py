"""llama.cpp's log → Python's logging: quiet by default, and at hand when something fails."""

from __future__ import annotations

import ctypes
import logging
from collections import deque

import llama_cpp

log = logging.getLogger("llmpipe.llama_cpp")
# The levels of ggml.h (those in llama-cpp-python's own comments are out of date). An error goes into the exception that
# it leads to, so the log shows it to those only who ask for details; so do the pages that it says about a model,
# and what it mends in a file's vocabulary.
_ERROR = 4
_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.WARNING, _ERROR: logging.DEBUG}
_VOCABULARY = "load: "
"""How the lines of `llama_vocab::impl::load` begin, which names itself."""
CALLED_BY_NATIVE_CODE = True
"""What is raised while `_callback` runs goes nowhere; whoever raises something from a signal can wait until it ends."""
_errors: deque[str] = deque(maxlen=20)
_line = ""
_level = 1


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _callback(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    # Level 5 continues the line before.
    global _line, _level
    if level != 5:
        _level = level
    _line += text.decode("utf-8", "replace")
    if not _line.endswith("\n"):
        return
    line, _line = _line.strip(), ""
    if _level == _ERROR:
        _errors.append(line)
    log.log(logging.DEBUG if line.startswith(_VOCABULARY) else _LEVELS.get(_level, logging.DEBUG), "%s", line)


def capture() -> None:
    """Send llama.cpp's log to the logger `llmpipe.llama_cpp`. Does no harm when called again."""
    llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))
    _errors.clear()


def clear() -> None:
    """Forget the errors so far."""
    _errors.clear()


def last_errors() -> str:
    """Return what llama.cpp complained of since `capture` or `clear`, in one line."""
    return "; ".join(dict.fromkeys(_errors))

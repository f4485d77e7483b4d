"""Ends a computation of llama.cpp in the middle, on the CPU, from another thread than the one that waits for it.

Between any two nodes of its graph llama.cpp asks a function whether to give up. One in Python would wait for Python's
lock each time, which another thread may hold. The C library's `strlen` waits for nothing, and its answer about a text
of ours is 0, or no, until there is something in it.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import llama_cpp

_C = ctypes.CDLL(None if os.name == "posix" else "msvcrt")


class Abort:
    """The wish to give up; contexts that were told of it heed it."""

    def __init__(self) -> None:
        self._text = ctypes.create_string_buffer(2)

    def tell(self, params: Any) -> None:
        """Let a context that is made with `params` heed it."""
        params.abort_callback = ctypes.cast(_C.strlen, llama_cpp.ggml_abort_callback)
        params.abort_callback_data = ctypes.cast(self._text, ctypes.c_void_p)

    def set(self) -> None:
        """Wish it: what is being computed fails within milliseconds, and so does what comes after."""
        self._text.value = b"x"

    def clear(self) -> None:
        """Wish it no longer."""
        self._text.value = b""

"""Number formats as ggml, the tensor library under llama.cpp, has them; llama-cpp-python does not bind these calls."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

from llama_cpp import llama_cpp as bindings

from llmpipe.config import CacheType


class NumberFormat(NamedTuple):
    """How ggml stores numbers."""

    type: int
    """ggml's number for it."""
    bytes_per_value: float
    """Quantised ones store blocks of values, which share a scale."""


def number_format(name: CacheType) -> NumberFormat:
    """Return what ggml knows under a name."""
    library: Any = bindings._lib
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_blck_size.restype = ctypes.c_int64
    number = next(i for i in range(bindings.GGML_TYPE_COUNT) if library.ggml_type_name(i) == name.value.encode())
    return NumberFormat(number, library.ggml_type_size(number) / library.ggml_blck_size(number))

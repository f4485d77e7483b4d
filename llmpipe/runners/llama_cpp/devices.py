"""The memory of the GPUs that llama.cpp sees, as ggml reports it; llama-cpp-python does not bind these calls."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

from llama_cpp import llama_cpp as bindings

GPU_KINDS = (1, 2)
"""`GGML_BACKEND_DEVICE_TYPE_GPU` and `_IGPU` of ggml-backend.h."""


def gpu_memory() -> tuple[int, int]:
    """Return the bytes in use and the bytes free, summed over all GPUs; whoever uses them."""
    used = free = 0
    for kind, free_bytes, total_bytes in devices():
        if kind in GPU_KINDS:
            used += total_bytes - free_bytes
            free += free_bytes
    return used, free


def devices() -> Iterator[tuple[int, int, int]]:
    """Yield the kind, the free and the total bytes of every device that ggml knows."""
    library: Any = bindings._lib
    get, memory = library.ggml_backend_dev_get, library.ggml_backend_dev_memory
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    memory.restype, memory.argtypes = None, [ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_size_t)] * 2]
    library.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    library.ggml_backend_dev_count.restype = ctypes.c_size_t
    for i in range(library.ggml_backend_dev_count()):
        device, free, total = get(i), ctypes.c_size_t(), ctypes.c_size_t()
        memory(device, ctypes.byref(free), ctypes.byref(total))
        yield library.ggml_backend_dev_type(device), free.value, total.value

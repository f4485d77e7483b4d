"""Running out of memory on any of PyTorch's devices, and how much there is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llmpipe.exceptions import LLMInferenceError, LLMOutOfMemoryError, one_line
from llmpipe.system import machine

SIGNS = ("out of memory", "can't allocate memory", "not enough memory")
"""What PyTorch's allocators say, each in its own words; only CUDA's has a type of its own."""


@contextmanager
def failures_of(model: Any) -> Iterator[None]:
    """Turn what a model's forward pass raises into an error of llmpipe's.

    Raises:
        LLMOutOfMemoryError: the device has too little memory.
        LLMInferenceError: the model fails for any other reason.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = one_line(error)
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in text for sign in SIGNS):
            raise LLMOutOfMemoryError(f"out of memory on {input_device(model)}") from error
        raise LLMInferenceError(f"the model fails: {text}") from error


def input_device(model: Any) -> torch.device:
    """Return where a model takes its tokens; one whose embeddings are on disk takes them from the host."""
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device


def devices_of(model: Any) -> list[torch.device]:
    """Return the devices that a model's weights are on; those that are offloaded to disk are on none."""
    return sorted({p.device for p in model.parameters() if p.device.type != "meta"}, key=str)


def kernels(devices: list[torch.device]) -> str:
    """Name what computes on these devices; what has the same name rounds alike.

    On a CPU the threads share sums out among them, so that their number is part of it.
    """
    cpu = f"cpu {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    names = {"cuda": torch.cuda.get_device_name, "cpu": lambda _: cpu}
    return ", ".join(names.get(device.type, str)(device) for device in devices)


def free_bytes(devices: list[torch.device]) -> int:
    """Return the memory that is free for a model on these devices: the GPUs' if it is on any, else this process's."""
    gpus = [device for device in devices if device.type == "cuda"]
    if not gpus:
        return machine.free_memory_bytes()
    # What PyTorch keeps for itself without using it is free as well.
    return sum(
        torch.cuda.mem_get_info(gpu)[0] + torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
        for gpu in gpus
    )


def used_and_peak_bytes(devices: list[torch.device]) -> tuple[int, int] | None:
    """Return the device memory that PyTorch uses, and its peak; None where the model is on the host."""
    gpus = [device for device in devices if device.type == "cuda"]
    if gpus:
        return sum(map(torch.cuda.memory_allocated, gpus)), sum(map(torch.cuda.max_memory_allocated, gpus))
    if any(device.type == "mps" for device in devices):
        return torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory()
    return None


def reset_peak() -> None:
    """Let the peak of device memory begin with what is in use now."""
    if torch.cuda.is_initialized():  # else nothing was used yet
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(gpu)


def empty_caches() -> None:
    """Give back what PyTorch keeps of device memory for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()

"""A GGUF file that was never loaded here is loaded first in a process of its own, and asked for a token.

llama.cpp checks much of a file, and ends the process where it finds some things impossible. What it survived once is
remembered, by the file's place, size and times, so that a model is probed once and not for every run.
"""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import llama_cpp

from llmpipe.config import DeviceConfig, LlamaCppConfig, SamplingConfig
from llmpipe.exceptions import LLMError, LLMInferenceError, LLMInitializationError
from llmpipe.records import Request
from llmpipe.runners.weights import BUNDLED_DIR

log = logging.getLogger(__name__)

CONTEXT = 32
"""Tokens of the context that a file is probed with."""


def probe(path: Path, config: LlamaCppConfig) -> None:
    """Make sure that loading `path` does not end the process.

    Raises:
        LLMInitializationError: it does, or it cannot be loaded.
    """
    if config.isolation or path.parent == BUNDLED_DIR:
        return
    known = _memory(path)
    if known.exists():
        return
    from llmpipe.runners.isolated import IsolatedRunner

    log.info("%s was not loaded here before: trying it in a process of its own", path.name)
    few = replace(config, model=str(path), isolation=True, slots=1, context=CONTEXT, n_gpu_layers=None, lora=[])
    few = replace(few, tensor_split=[], mmap=True, mlock=False, chat_template=None, reproducible=False)
    try:
        with IsolatedRunner(config._target_, LlamaCppConfig, few, DeviceConfig("cpu")) as runner:
            request = Request(0, SamplingConfig(max_tokens=1, ignore_eos=True), "a")
            runner.run([request])
            if runner.info()["isolation"]["restarts"]:
                raise LLMInferenceError("computing with it crashed the backend")
    except LLMError as error:
        raise LLMInitializationError(f"{path} cannot be loaded, or is damaged: {error}") from error
    with suppress(OSError):  # then it is probed again
        known.parent.mkdir(parents=True, exist_ok=True)
        known.touch()


def _memory(path: Path) -> Path:
    """Return the empty file whose presence says that this file was loaded by this llama.cpp."""
    status = path.stat()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    facts = (path.resolve(), status.st_size, status.st_mtime_ns, status.st_ino, llama_cpp.__version__)
    return cache / "llmpipe" / "loaded" / hashlib.sha256(repr(facts).encode()).hexdigest()[:32]

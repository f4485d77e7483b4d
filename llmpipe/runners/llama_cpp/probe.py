"""GGUF files that were never loaded here are loaded first in a process of their own, and asked for a token.

llama.cpp checks much of a file, and ends the process where it finds some things impossible. What it survived once is
remembered, by the files' places, sizes and times, so that a model is probed once and not for every run.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import llama_cpp

from llmpipe.config import DeviceConfig, LlamaCppConfig, SamplingConfig
from llmpipe.exceptions import LLMError, LLMInferenceError, LLMInitializationError
from llmpipe.records import Request
from llmpipe.runners.llama_cpp.model import adapter_file
from llmpipe.runners.weights import BUNDLED_DIR

if TYPE_CHECKING:
    from llmpipe.runners.isolated import IsolatedRunner

log = logging.getLogger(__name__)

CONTEXT = 32
"""Tokens of the context that a file is probed with."""


def probe(path: Path, config: LlamaCppConfig, weights: bool = True) -> None:
    """Make sure that loading `path` does not end the process: with the adapters in `config`, or without any weights.

    Raises:
        LLMInitializationError: it does, or they cannot be loaded.
    """
    adapters = config.lora if weights else []
    files = [path, *(adapter_file(adapter)[0] for adapter in adapters)]
    if config.isolation or all(file.parent == BUNDLED_DIR for file in files):
        return
    if os.name != "posix":  # where there is no such process; better a risk than no model at all
        return
    known = _memory(files, weights)
    if os.path.exists(known) or os.path.exists(_memory(files, weights=True)):
        return
    from llmpipe.runners.isolated import IsolatedRunner

    log.info("not loaded here before, so tried in a process of its own: %s", ", ".join(file.name for file in files))
    few = replace(
        config, model=str(path), isolation=True, slots=1, threads=1, context=CONTEXT, n_gpu_layers=None, lora=adapters
    )
    few = replace(few, tensor_split=[], mmap=True, mlock=False, chat_template=None, reproducible=False)
    try:
        with IsolatedRunner(config._target_, LlamaCppConfig, few, DeviceConfig("cpu"), weights=weights) as runner:
            if weights:
                _try(runner)
    except LLMError as error:
        names = ", ".join(map(str, files))
        raise LLMInitializationError(f"{names} cannot be loaded, or is damaged: {error}") from error
    with suppress(OSError):  # then it is probed again
        known.parent.mkdir(parents=True, exist_ok=True)
        known.touch()


def _try(runner: IsolatedRunner) -> None:
    """Ask for a token.

    Raises:
        LLMInferenceError: there is none, for the process ended.
    """
    runner.run([Request(0, SamplingConfig(max_tokens=1, ignore_eos=True), "a")])
    if runner.info()["isolation"]["restarts"]:
        raise LLMInferenceError("computing with it crashed the backend")


def _memory(files: Sequence[Path], weights: bool) -> Path:
    """Return the empty file whose presence says that these files were loaded by this llama.cpp."""
    found = [(file.resolve(), file.stat()) for file in files]
    facts = [(path, status.st_size, status.st_mtime_ns, status.st_ino) for path, status in found]
    digest = hashlib.sha256(repr((facts, weights, llama_cpp.__version__)).encode()).hexdigest()
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # an unknown user, who has no home
        cache = Path(os.devnull)  # in which nothing can be
    return cache / "llmpipe" / "loaded" / digest[:32]

"""GGUF files that were never loaded here are loaded first in a process of their own, and asked for a few tokens.

llama.cpp checks much of a file, and ends the process where it finds some things impossible. It may also end it on a
file that is fine: weights are laid out anew for the processor, and the instructions that this is done for can fail,
as AMX does where an older compiler got its tile configuration wrong. What came of it is remembered, by the files'
places, sizes and times, so that a model is probed once and not for every run.
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

from llmpipe.config import DeviceConfig, LlamaCppConfig, SamplingConfig, Switch
from llmpipe.exceptions import LLMError, LLMInferenceError, LLMInitializationError
from llmpipe.quoting import listed
from llmpipe.records import Request
from llmpipe.runners.llama_cpp.model import adapter_file
from llmpipe.runners.weights import BUNDLED_DIR

if TYPE_CHECKING:
    from llmpipe.runners.isolated import IsolatedRunner

log = logging.getLogger(__name__)

CONTEXT = 32
"""Tokens of the context that a file is probed with."""
PROMPT = "a b c d e f g h"
"""More than one token: for one alone llama.cpp has other code."""


def probe(path: Path, config: LlamaCppConfig, weights: bool = True) -> bool:
    """Make sure that loading `path` does not end the process: with the adapters in `config`, or without any weights.

    Returns:
        Whether weights may be laid out anew for this processor.

    Raises:
        LLMInitializationError: it does, or they cannot be loaded.
    """
    from llmpipe.runners.isolated import IsolatedRunner

    adapters = config.lora if weights else []
    files = [path, *(adapter_file(adapter)[0] for adapter in adapters)]
    layouts = [Switch.on, Switch.off] if config.repack is Switch.auto and weights else [config.repack]
    is_apart = config.isolation and len(layouts) == 1
    # Without processes of their own (Windows), better a risk than no model at all.
    if is_apart or os.name != "posix" or all(file.parent == BUNDLED_DIR for file in files):
        return config.repack is not Switch.off
    memory = _memory(files, weights)
    known = _recall(memory)
    if known in layouts or (not weights and _recall(_memory(files, weights=True))):
        return known is not Switch.off
    log.info("not loaded here before, so tried in a process of its own: %s", listed(file.name for file in files))
    few = replace(
        config, model=str(path), isolation=True, slots=2, threads=1, context=CONTEXT, n_gpu_layers=None, lora=adapters
    )
    few = replace(few, tensor_split=[], mmap=True, mlock=False, chat_template=None, reproducible=False)
    while True:
        layout = layouts.pop(0)
        try:
            with IsolatedRunner(
                config._target_, LlamaCppConfig, replace(few, repack=layout), DeviceConfig("cpu"), weights=weights
            ) as runner:
                if weights:
                    _try(runner)
            break
        except LLMError as error:
            if not layouts or not isinstance(error, LLMInferenceError):
                names = listed(files)
                raise LLMInitializationError(f"{names} cannot be loaded, or is damaged: {error}") from error
            log.warning("llama.cpp crashes with weights laid out for this processor; trying them as they are")
    with suppress(OSError):  # then it is probed again
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(layout.value)
    return layout is not Switch.off


def _try(runner: IsolatedRunner) -> None:
    """Ask for a few tokens: of several rows at once, as other code than for one computes them.

    Raises:
        LLMInferenceError: there are none, for the process ended.
    """
    sampling = SamplingConfig(max_tokens=2, ignore_eos=True, n=2)
    runner.run([Request(0, sampling, PROMPT, samples=(0, 1))])
    if runner.info()["isolation"]["restarts"]:
        raise LLMInferenceError("computing with it crashed the backend")


def _memory(files: Sequence[Path], weights: bool) -> Path:
    """Return the file that says how these files were loaded by this llama.cpp on this processor."""
    found = [(file.resolve(), file.stat()) for file in files]
    facts = [(path, status.st_size, status.st_mtime_ns, status.st_ino) for path, status in found]
    here = llama_cpp.__version__, llama_cpp.llama_print_system_info()
    digest = hashlib.sha256(repr((facts, weights, here)).encode()).hexdigest()
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # an unknown user, who has no home
        cache = Path(os.devnull)  # in which nothing can be
    return cache / "llmpipe" / "loaded" / digest[:32]


def _recall(memory: Path) -> Switch | None:
    """Return the layout with which it went well; None where that was not tried."""
    try:
        return Switch(memory.read_text())
    except (OSError, ValueError):
        return None

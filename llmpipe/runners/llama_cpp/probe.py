"""GGUF files that were never loaded here are loaded first in a process of their own, and asked for a few tokens.

llama.cpp checks much of a file, and ends the process where it finds some things impossible. It may also end it on a
file that is fine: weights are laid out anew for the processor, and the instructions that this is done for can fail,
as AMX does where an older compiler got its tile configuration wrong. What came of it is remembered; see trials.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import llama_cpp

from llmpipe.config import DeviceConfig, LlamaCppConfig, SamplingConfig, Switch
from llmpipe.exceptions import LLMError, LLMInferenceError, LLMInitializationError
from llmpipe.quoting import listed
from llmpipe.records import Request
from llmpipe.runners.digests import files_of
from llmpipe.runners.llama_cpp.model import adapter_file
from llmpipe.runners.trials import Trial, TrialRunner, quietly

log = logging.getLogger(__name__)

CONTEXT = 32
"""Tokens of the context that a file is probed with."""
PROMPT = "a b c d e f g h"
"""More than one token: for one alone llama.cpp has other code."""
GROWTH = 3
"""Weights that are laid out anew are in memory twice, for a moment."""


def probe(path: Path, config: LlamaCppConfig, weights: bool = True) -> bool:
    """Make sure that loading `path` does not end the process: with the adapters in `config`, or without any weights.

    Returns:
        Whether weights may be laid out anew for this processor.

    Raises:
        LLMInitializationError: it does, or they cannot be loaded.
    """
    adapters = config.lora if weights else []
    files = [*files_of(path), *(adapter_file(adapter)[0] for adapter in adapters)]
    layouts = [Switch.on, Switch.off] if config.repack is Switch.auto and weights else [config.repack]
    is_apart = config.isolation and len(layouts) == 1
    trial = _trial(files, weights)
    if is_apart or not trial.is_needed:
        return config.repack is not Switch.off
    known = trial.recall()
    if known in layouts or (not weights and _trial(files, weights=True).recall()):
        return known != Switch.off
    log.info("not loaded here before, so tried in a process of its own: %s", listed(file.name for file in files))
    few = replace(
        config, model=str(path), isolation=True, slots=2, threads=1, context=CONTEXT, n_gpu_layers=None, lora=adapters
    )
    few = replace(few, tensor_split=[], mmap=True, mlock=False, chat_template=None, reproducible=False)
    while True:
        layout = layouts.pop(0)
        try:
            few = replace(few, repack=layout)
            asked = config._target_, LlamaCppConfig, few, DeviceConfig("cpu")
            with quietly(), TrialRunner(trial, *asked, weights=weights) as runner:
                if weights:
                    _try(runner)
            break
        except LLMError as error:
            if not layouts or not isinstance(error, LLMInferenceError):
                names = listed(files)
                raise LLMInitializationError(f"{names} cannot be loaded, or is damaged: {error}") from error
            log.warning("llama.cpp crashes with weights laid out for this processor; trying them as they are")
    trial.remember(layout.value)
    return layout is not Switch.off


def _trial(files: Sequence[Path], weights: bool) -> Trial:
    """Return the trial of these files with this llama.cpp on this processor."""
    here = weights, llama_cpp.__version__, llama_cpp.llama_print_system_info()
    return Trial(files, here, GROWTH)


def _try(runner: TrialRunner) -> None:
    """Ask for a few tokens: of several rows at once, as other code than for one computes them.

    Raises:
        LLMInferenceError: there are none, for the process ended.
    """
    sampling = SamplingConfig(max_tokens=2, ignore_eos=True, n=2)
    done = runner.run([Request(0, sampling, PROMPT, samples=(0, 1))])
    if runner.crashes:
        how = next((completion.error for completion in done if completion.error), "crashed the backend, but not always")
        raise LLMInferenceError(f"computing with it {how}")

"""llmpipe: an offline batch runner for language models.

A dataset, a model and a few lines of config in; every answer, with latency and memory, out. The command is `llmpipe`;
the library is the names below. Importing this package loads no backend: each name is fetched when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from llmpipe.version import __version__

if TYPE_CHECKING:
    from llmpipe.config import BackendType, DeviceType, ModelConfig, RunConfig, SamplingConfig, SamplingOptions, compose
    from llmpipe.exceptions import (
        DatasetError,
        LedgerError,
        LLMConfigError,
        LLMError,
        LLMInferenceError,
        LLMInitializationError,
        MissingDependencyError,
    )
    from llmpipe.outputs import read_run
    from llmpipe.pipeline import run
    from llmpipe.records import Chunk, Completion, Request
    from llmpipe.runners import (
        BaseLLMRunner,
        EchoRunner,
        LlamaCppRunner,
        LLMRunnerFactory,
        TransformersRunner,
    )
    from llmpipe.runners.openai_format import ChatCompletion, ChatCompletionChunk

_HOME = {
    "BackendType": "config",
    "DeviceType": "config",
    "ModelConfig": "config",
    "RunConfig": "config",
    "SamplingConfig": "config",
    "SamplingOptions": "config",
    "compose": "config",
    "DatasetError": "exceptions",
    "LedgerError": "exceptions",
    "LLMConfigError": "exceptions",
    "LLMError": "exceptions",
    "LLMInferenceError": "exceptions",
    "LLMInitializationError": "exceptions",
    "MissingDependencyError": "exceptions",
    "read_run": "outputs",
    "run": "pipeline",
    "Chunk": "records",
    "Completion": "records",
    "Request": "records",
    "BaseLLMRunner": "runners",
    "EchoRunner": "runners",
    "LlamaCppRunner": "runners",
    "LLMRunnerFactory": "runners",
    "TransformersRunner": "runners",
    "ChatCompletion": "runners.openai_format",
    "ChatCompletionChunk": "runners.openai_format",
}

__all__ = [
    "BackendType",
    "BaseLLMRunner",
    "ChatCompletion",
    "ChatCompletionChunk",
    "Chunk",
    "Completion",
    "DatasetError",
    "DeviceType",
    "EchoRunner",
    "LLMConfigError",
    "LLMError",
    "LLMInferenceError",
    "LLMInitializationError",
    "LLMRunnerFactory",
    "LedgerError",
    "LlamaCppRunner",
    "MissingDependencyError",
    "ModelConfig",
    "Request",
    "RunConfig",
    "SamplingConfig",
    "SamplingOptions",
    "TransformersRunner",
    "__version__",
    "compose",
    "read_run",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llmpipe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"llmpipe.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__

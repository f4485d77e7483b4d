"""The single import of old: `from llmpipe.llm_runner import LLMRunnerFactory, ModelConfig, ...`.

Everything here lives elsewhere and is only passed on; new code imports it from `llmpipe`. As there, a backend's package
is loaded when its runner is first named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import llmpipe

if TYPE_CHECKING:
    from llmpipe import (
        BackendType,
        BaseLLMRunner,
        DeviceType,
        EchoRunner,
        LlamaCppRunner,
        LLMConfigError,
        LLMError,
        LLMInferenceError,
        LLMInitializationError,
        LLMRunnerFactory,
        MissingDependencyError,
        ModelConfig,
        SamplingConfig,
        TransformersRunner,
    )

__all__ = [
    "BackendType",
    "BaseLLMRunner",
    "DeviceType",
    "EchoRunner",
    "LLMConfigError",
    "LLMError",
    "LLMInferenceError",
    "LLMInitializationError",
    "LLMRunnerFactory",
    "LlamaCppRunner",
    "MissingDependencyError",
    "ModelConfig",
    "SamplingConfig",
    "TransformersRunner",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'llmpipe.llm_runner' has no attribute {name!r}")
    return getattr(llmpipe, name)


def __dir__() -> list[str]:
    return __all__

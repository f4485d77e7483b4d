"""The runners, each fetched with its backend's package only when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmpipe.runners.base import BaseLLMRunner
    from llmpipe.runners.echo import EchoRunner
    from llmpipe.runners.factory import LLMRunnerFactory
    from llmpipe.runners.llama_cpp import LlamaCppRunner
    from llmpipe.runners.transformers import TransformersRunner

_HOME = {
    "BaseLLMRunner": "base",
    "EchoRunner": "echo",
    "LLMRunnerFactory": "factory",
    "LlamaCppRunner": "llama_cpp",
    "TransformersRunner": "transformers",
}

__all__ = ["BaseLLMRunner", "EchoRunner", "LLMRunnerFactory", "LlamaCppRunner", "TransformersRunner"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llmpipe.runners' has no attribute {name!r}")
    return getattr(importlib.import_module(f"llmpipe.runners.{_HOME[name]}"), name)

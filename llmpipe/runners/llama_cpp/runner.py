"""`LlamaCppRunner`: GGUF models in this process."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import psutil

from llmpipe.config import LlamaCppConfig
from llmpipe.exceptions import LLMInitializationError, MissingDependencyError
from llmpipe.records import Chunk, Message, Request
from llmpipe.runners.base import BaseLLMRunner, check_bias, fit_prompt
from llmpipe.runners.chat import ChatTemplateError
from llmpipe.runners.weights import find_gguf

try:
    import llama_cpp

    from llmpipe.runners.llama_cpp import log as llama_log
    from llmpipe.runners.llama_cpp.engine import Engine
    from llmpipe.runners.llama_cpp.model import Model, can_offload
except ImportError as error:
    raise MissingDependencyError("llama-cpp-python", "llama-cpp", "backend=llama_cpp") from error
except (OSError, RuntimeError) as error:  # what llama-cpp-python raises when its shared library does not load
    raise LLMInitializationError(
        f"llama-cpp-python is installed, but its library does not load ({error}): "
        f"pip install --force-reinstall --no-cache-dir llama-cpp-python"
    ) from error

log = logging.getLogger(__name__)

DEFAULT_SLOTS = 8
DEFAULT_CONTEXT = 4096


class LlamaCppRunner(BaseLLMRunner):
    """Runs a GGUF model with continuous batching on llama.cpp's own API."""

    config_type = LlamaCppConfig
    config: LlamaCppConfig
    _model: Model | None = None
    _engine: Engine | None = None

    def _initialize_model(self) -> None:
        llama_log.capture()
        llama_cpp.llama_backend_init()
        self._offload = can_offload(self.device)
        path = find_gguf(self.config.model)
        self._model = Model(path, self.config, self._offload, self.device.index)
        context = self.config.context or min(self._model.train_context, DEFAULT_CONTEXT)
        self._slots = DEFAULT_SLOTS if self.config.slots == "auto" else int(self.config.slots)
        limit = llama_cpp.llama_max_parallel_sequences()
        if self._slots > limit:
            raise LLMInitializationError(f"backend.slots={self._slots} is more than llama.cpp's {limit}")
        self._threads = self.config.threads or psutil.cpu_count(logical=False) or os.cpu_count() or 1
        self._engine = Engine(self._model, self.config, self._slots, context, self._threads)
        log.info(
            "%s: %s, %d slots of %d tokens, %d threads",
            path.name,
            self._model.describe(),
            self._slots,
            context,
            self._threads,
        )

    def _release_model(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        if self._model is not None:
            self._model.close()
            self._model = None

    def stream(self, requests: Iterable[Request]) -> Iterator[Chunk]:
        """Answer `requests` in `backend.slots` slots; see `BaseLLMRunner.stream`."""
        self._check_loaded()
        assert self._engine is not None
        return self._engine.stream(requests, self.encode)

    def encode(self, request: Request) -> tuple[list[int], int]:
        """Return a request's prompt tokens, and how many were cut off on the left to fit the context.

        Raises:
            ValueError: the prompt is empty, exceeds the context, is no text, or the template refuses it.
        """
        assert self._model is not None and self._engine is not None
        check_bias(request.sampling, self._model.n_vocab)
        tokens = self._model.tokenize(self.prompt_text(request), special=request.messages is None)
        return fit_prompt(tokens, self._engine.context, request.truncate)

    @property
    def chat_template(self) -> str | None:
        """The template in the file's metadata, or the configured one."""
        return self._model.chat.source if self._model is not None and self._model.chat is not None else None

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt text of a chat; see `BaseLLMRunner.render`."""
        if self._model is None or self._model.chat is None:
            raise ChatTemplateError("the model has no chat template: use prompt=raw or backend.chat_template=FILE")
        return self._model.chat.render(messages)

    def info(self) -> dict[str, Any]:
        """Say what was loaded and what was chosen."""
        self._check_loaded()
        assert self._model is not None and self._engine is not None
        return {
            "model": self.config.model,
            "model_type": self._model.describe(),
            "device": "gpu" if self._offload else "cpu",
            "slots": self._slots,
            "context": self._engine.context,
            "threads": self._threads,
            "llama_cpp_python": llama_cpp.__version__,
        }

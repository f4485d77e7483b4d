"""`TransformersRunner`: causal language models of transformers, on PyTorch."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from llmpipe.config import Batching, TransformersConfig
from llmpipe.exceptions import LLMInitializationError, MissingDependencyError
from llmpipe.records import Chunk, Message, Request
from llmpipe.runners.base import BaseLLMRunner, check_bias, fit_prompt
from llmpipe.runners.batching import Engine
from llmpipe.runners.chat import ChatTemplateError
from llmpipe.runners.weights import find_checkpoint

try:
    import torch
    import transformers

    from llmpipe.runners.transformers import loading, memory
    from llmpipe.runners.transformers.executor import SlotExecutor, UnsuitableModelError
    from llmpipe.runners.transformers.padded import PaddedEngine
except ImportError as error:
    raise MissingDependencyError("transformers and torch", "transformers", "backend=transformers") from error

log = logging.getLogger(__name__)
transformers.utils.logging.disable_progress_bar()  # llmpipe shows its own

PADDED_SLOTS = 16


class TransformersRunner(BaseLLMRunner):
    """Runs a causal language model: in slots where its attention allows it, else in padded batches."""

    config_type = TransformersConfig
    config: TransformersConfig
    _model: Any = None
    _tokenizer: Any = None
    _engine: Engine | PaddedEngine | None = None

    def _initialize_model(self) -> None:
        config = self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        loaded = loading.load(config, find_checkpoint(config.model), loading.torch_device(self.device))
        self._model, self._tokenizer, self._choices = loaded.model, loaded.tokenizer, loaded.choices
        self._devices = memory.devices_of(self._model)
        self._vocabulary: int = self._model.config.get_text_config().vocab_size
        self._engine = self._make_engine(loaded.end_tokens, config.context or loaded.context)
        log.info("%s: %s in %s on %s", config.model, type(self._model).__name__, self._model.dtype, self._model.device)
        for choice in self._choices:
            log.info("%s", choice)

    def _make_engine(self, end_tokens: set[int], context: int) -> Engine | PaddedEngine:
        config = self.config
        if config.reproducible and config.slots != 1:
            # The kernels that multiply matrices are chosen by their shapes: only a row alone is sure to be the same.
            self._choices.append("1 row at a time: backend.reproducible=true")
            config = replace(config, slots=1)
        try:
            if config.batching is Batching.padded:
                raise UnsuitableModelError("backend.batching=padded")
            if config.attn_implementation is not None:
                raise UnsuitableModelError(f"backend.attn_implementation={config.attn_implementation}")
            return Engine(SlotExecutor(self._model, self._tokenizer, end_tokens), config, context)
        except UnsuitableModelError as error:
            if config.batching is Batching.slots:
                raise LLMInitializationError(f"backend.batching=slots, but {config.model} cannot: {error}") from error
            self._choices.append(f"padded batches: {error}")
        slots = PADDED_SLOTS if config.slots == "auto" else int(config.slots)
        return PaddedEngine(self._model, self._tokenizer, end_tokens, slots, context)

    def _release_model(self) -> None:
        if isinstance(self._engine, Engine):
            self._engine.close()
        self._engine = self._model = self._tokenizer = None
        gc.collect()
        memory.empty_caches()

    def cancel(self, request_id: int) -> None:
        """Give up a request of the running stream; it ends with an error chunk, and its slots are free at once."""
        if self._engine is not None:
            self._engine.cancelled.add(request_id)

    def stream(self, requests: Iterable[Request]) -> Iterator[Chunk]:
        """Answer `requests`, `backend.slots` rows at a time; see `BaseLLMRunner.stream`."""
        self._check_loaded()
        assert self._engine is not None
        return self._engine.stream(requests, self.encode)

    def encode(self, request: Request) -> tuple[list[int], int]:
        """Return a request's prompt tokens, and how many were cut off on the left to fit the context.

        Raises:
            ValueError: the prompt is empty, exceeds the context, is no text, or the template refuses it.
        """
        assert self._engine is not None
        check_bias(request.sampling, self._vocabulary)
        text = self.prompt_text(request)
        text.encode("utf-8")  # a lone surrogate is an error here, and not a panic in the tokenizer
        ids = self._tokenizer(text, add_special_tokens=request.messages is None, verbose=False)["input_ids"]
        return fit_prompt(list(ids), self._engine.limit, request.truncate)

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's template, or the configured one."""
        template = self._tokenizer.chat_template if self._tokenizer is not None else None
        if isinstance(template, dict):
            template = template.get("default")
        return template if template is None else str(template)

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt text of a chat; see `BaseLLMRunner.render`."""
        if self.chat_template is None:
            raise ChatTemplateError("the model has no chat template: use prompt=raw or backend.chat_template=FILE")
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of the model's: it may fail in any way
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from error
        return str(text)

    def info(self) -> dict[str, Any]:
        """Say what was loaded and what was chosen."""
        self._check_loaded()
        engine = self._engine
        assert engine is not None
        return {
            "model": self.config.model,
            "model_type": type(self._model).__name__,
            "device": str(self._model.device),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "batching": "slots" if isinstance(engine, Engine) else "padded",
            "slots": engine.most_slots if isinstance(engine, Engine) else engine.slots,
            "context": engine.limit,
            "sizes": [*self._choices, *(engine.reasons if isinstance(engine, Engine) else [])],
            "shrinks": engine.shrinks,
            "decode_s": engine.decode_s if isinstance(engine, Engine) else None,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def _device_memory_mb(self) -> tuple[float, float] | None:
        used = memory.used_and_peak_bytes(self._devices)
        return None if used is None else (used[0] / 1e6, used[1] / 1e6)

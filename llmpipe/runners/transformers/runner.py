"""`TransformersRunner`: causal language models of transformers, on PyTorch."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from llmpipe.config import Batching, TransformersConfig
from llmpipe.exceptions import LLMInitializationError, MissingDependencyError
from llmpipe.records import Chunk, Request
from llmpipe.runners.base import BaseLLMRunner
from llmpipe.runners.batching import Engine, sequence, sizing
from llmpipe.runners.chat import ChatTemplate, ChatTemplateError
from llmpipe.runners.encoding import tokens_of, with_stop_tokens
from llmpipe.runners.facts import Facts
from llmpipe.runners.fitting import check_tokens, fit_prompt, known_tokens
from llmpipe.runners.preview import Preview
from llmpipe.runners.threads import Threads
from llmpipe.runners.weights import find_checkpoint, hub_commit

try:
    import torch
    import transformers

    from llmpipe.runners.transformers import loading, memory, padded, sampler
    from llmpipe.runners.transformers.executor import SlotExecutor, UnsuitableModelError, refuse_unsuitable
    from llmpipe.runners.transformers.padded import PaddedExecutor
    from llmpipe.runners.transformers.tokens import Tokens
except ImportError as error:
    raise MissingDependencyError("transformers and torch", "transformers", "backend=transformers") from error

log = logging.getLogger(__name__)

MOST_THREADS = torch.get_num_threads()
"""torch's threads when this is first imported, as OMP_NUM_THREADS or a person has set them."""


def _chats_of(tokenizer: Any) -> dict[str, ChatTemplate]:
    """Return a tokenizer's templates by name: `default`, and perhaps `tool_use`.

    They are not rendered by transformers, whose sandbox has no limits of time and size.

    Raises:
        LLMConfigError: one of them cannot be used.
    """
    found = tokenizer.chat_template
    sources = found if isinstance(found, dict) else {} if found is None else {"default": found}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {
        name: ChatTemplate(str(source), special) for name, source in sources.items() if name in ("default", "tool_use")
    }


class TransformersRunner(BaseLLMRunner):
    """Runs a causal language model: in slots where its attention allows it, else in padded batches."""

    config_type = TransformersConfig
    ticks = True
    joinable = True
    honours = sequence.OPTIONS | sampler.OPTIONS
    config: TransformersConfig
    _model: Any = None
    _tokenizer: Any = None
    _chats: Mapping[str, ChatTemplate] = {}
    _engine: Engine | None = None

    def _initialize_model(self) -> None:
        config = self.config
        memory.reset_peak()
        self._threads = Threads(config, MOST_THREADS)
        self._set_threads()
        loaded = loading.load(config, find_checkpoint(config.model), loading.torch_device(self.device))
        self._model, self._tokenizer, self._choices = loaded.model, loaded.tokenizer, loaded.choices
        self._chats = _chats_of(self._tokenizer)
        self._tokens = Tokens(self._tokenizer, loaded.end_tokens)
        self._devices = memory.devices_of(self._model)
        self._vocabulary: int = self._model.config.get_text_config().vocab_size
        self._limit = config.context or loaded.context
        self._set_threads()
        self._engine = self._make_engine(loaded.end_tokens)
        if config.compile:  # now that it is known how it is computed
            self._model.compile(dynamic=True)
        log.info(
            "%s: %s in %s on %s",
            config.model,
            type(self._model).__name__,
            self._model.dtype,
            memory.input_device(self._model),
        )
        for choice in self._choices:
            log.info("%s", choice)

    def _preview_model(self) -> Preview:
        device = loading.torch_device(self.device)
        with loading.Checkpoint(self.config, find_checkpoint(self.config.model)) as checkpoint:
            self._tokenizer = checkpoint.tokenizer
            self._chats = _chats_of(self._tokenizer)
            self._tokens = Tokens(self._tokenizer)
            self._vocabulary = checkpoint.config.get_text_config().vocab_size
            self._limit = self.config.context or checkpoint.context
            model, footprint = checkpoint.outline(device)
        self._choices = []
        config = self._sized(self.config)
        try:
            self._refuse_slots()
            refuse_unsuitable(model)
            sizes = partial(sizing.choose, config, footprint, limit=self._limit, free_bytes=memory.free_bytes([device]))
        except UnsuitableModelError as error:
            self._choose_padded(error)
            sizes = partial(padded.choose_sizes, config)
        return Preview(
            model_type=type(model).__name__,
            device=str(device),
            context=self._limit,
            footprint=footprint,
            sizes=lambda waiting: replace(found := sizes(waiting), reasons=(*self._choices, *found.reasons)),
        )

    def _make_engine(self, end_tokens: set[int]) -> Engine:
        config = self._sized(self.config)
        model = self._model, self._tokenizer, end_tokens, config
        executor: SlotExecutor | PaddedExecutor
        try:
            self._refuse_slots()
            executor = SlotExecutor(*model)
        except UnsuitableModelError as error:
            self._choose_padded(error)
            executor = PaddedExecutor(*model, self._limit)
        self._batching = executor.batching.value
        return Engine(executor, config, self._limit)

    def _sized(self, config: TransformersConfig) -> TransformersConfig:
        """Return the config with one slot where rows must not share a computation."""
        if not config.reproducible or config.slots == 1:
            return config
        # The kernels that multiply matrices are chosen by their shapes: only a row alone is sure to be the same.
        self._choices.append("1 row at a time: backend.reproducible=true")
        return replace(config, slots=1)

    def _refuse_slots(self) -> None:
        """Refuse slots where an option of the config does not go with them."""
        if self.config.batching is Batching.padded:
            raise UnsuitableModelError("backend.batching=padded")
        if self.config.attn_implementation is not None:
            raise UnsuitableModelError(f"backend.attn_implementation={self.config.attn_implementation}")

    def _choose_padded(self, error: UnsuitableModelError) -> None:
        if self.config.batching is Batching.slots:
            message = f"backend.batching=slots, but {self.config.model} cannot: {error}"
            raise LLMInitializationError(message) from error
        self._choices.append(f"padded batches: {error}")

    def _release_model(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = self._model = self._tokenizer = None
        self._chats = {}
        gc.collect()
        memory.empty_caches()

    def cancel(self, request_id: int) -> None:
        """Give up a request of the running stream; it ends with an error chunk, and its slots are free at once."""
        if self._engine is not None:
            self._engine.cancel(request_id)

    def stream(self, requests: Iterable[Request | None]) -> Iterator[Chunk]:
        """Answer `requests`, `backend.slots` rows at a time; see `BaseLLMRunner.stream`."""
        self._check_loaded()
        assert self._engine is not None
        return self._engine.stream(with_stop_tokens(requests, self._tokens), self.encode, self._before_step)

    def _before_step(self) -> None:
        self.tick()
        self._set_threads()

    def _set_threads(self) -> None:
        if (threads := self._threads.look()) != torch.get_num_threads():
            torch.set_num_threads(threads)

    def encode(self, request: Request) -> tuple[list[int], int]:
        """Return a request's prompt tokens, and how many were cut off on the left to fit the context.

        Raises:
            ValueError: the prompt is empty, exceeds the context, is no text, or the template refuses it.
        """
        self.check_sampling(request.sampling)
        check_tokens(request.sampling, self._vocabulary)
        return fit_prompt(tokens_of(request, self.prompt_text, self._tokens), self._limit, request.truncate)

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Return the token ids of a text; see `BaseLLMRunner.tokenize`."""
        with self._resident:
            self._check_loaded()
            return self._tokens.tokenize(text, literal=not special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; see `BaseLLMRunner.detokenize`."""
        with self._resident:
            self._check_loaded()
            tokens = known_tokens(ids, self._vocabulary)
            return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's template, or the configured one."""
        return self._chats["default"].source if "default" in self._chats else None

    def template_for(self, tools: Sequence[Mapping[str, Any]] | None) -> ChatTemplate:
        """Return what renders a chat; see `BaseLLMRunner.template_for`."""
        template = (self._chats.get("tool_use") if tools else None) or self._chats.get("default")
        if template is None:
            raise ChatTemplateError("the model has no chat template: use prompt=raw or backend.chat_template=FILE")
        return template

    def facts(self) -> Facts:
        """Say what decides the answers beside the options; see `BaseLLMRunner.facts`."""
        commit = hub_commit(self.config.model, "config.json", self.config.revision)
        versions = {"torch": str(torch.__version__), "transformers": transformers.__version__}
        facts = Facts({"commit": commit}, {"context": self._limit, **versions})
        if self._model is not None:
            facts.decides["dtype"] = self._dtype
            facts.last_digits.update(kernels=memory.kernels(self._devices), batching=self._batching)
        return facts

    @property
    def _dtype(self) -> str:
        return str(self._model.dtype).removeprefix("torch.")

    def info(self) -> dict[str, Any]:
        """Say what was loaded and what was chosen."""
        self._check_loaded()
        assert self._engine is not None
        engine = self._engine.info()
        return {
            "model": self.config.model,
            "model_type": type(self._model).__name__,
            "parameters": self._model.num_parameters(),
            "device": str(memory.input_device(self._model)),
            "dtype": self._dtype,
            "batching": self._batching,
            "threads": self._threads.now,
            **engine,
            "sizes": [*self._choices, *engine["sizes"]],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def _device_memory_mb(self) -> tuple[float, float] | None:
        used = memory.used_and_peak_bytes(self._devices)
        return None if used is None else (used[0] / 1e6, used[1] / 1e6)

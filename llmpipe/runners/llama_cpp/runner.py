"""`LlamaCppRunner`: GGUF models in this process."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmpipe.config import LlamaCppConfig, RopeScaling
from llmpipe.exceptions import LLMConfigError, LLMInitializationError, MissingDependencyError
from llmpipe.records import Chunk, Request
from llmpipe.runners.base import BaseLLMRunner
from llmpipe.runners.chat import ChatTemplate, ChatTemplateError
from llmpipe.runners.encoding import tokens_of, with_stop_tokens
from llmpipe.runners.facts import Facts
from llmpipe.runners.fitting import check_tokens, fit_prompt, known_tokens
from llmpipe.runners.threads import Threads
from llmpipe.runners.weights import find_gguf, hub_commit

try:
    import llama_cpp

    from llmpipe.runners.batching import Engine, sequence, sizing
    from llmpipe.runners.llama_cpp import devices, sampler
    from llmpipe.runners.llama_cpp import log as llama_log
    from llmpipe.runners.llama_cpp.abort import Abort
    from llmpipe.runners.llama_cpp.executor import LlamaExecutor
    from llmpipe.runners.llama_cpp.model import Model, can_offload
    from llmpipe.runners.llama_cpp.probe import probe
    from llmpipe.runners.llama_cpp.vocabulary import Vocabulary
    from llmpipe.runners.preview import Preview
except ImportError as error:
    raise MissingDependencyError("llama-cpp-python", "llama-cpp", "backend=llama_cpp") from error
except (OSError, RuntimeError) as error:  # what llama-cpp-python raises when its shared library does not load
    raise LLMInitializationError(
        f"llama-cpp-python is installed, but its library does not load ({error}): "
        f"pip install --force-reinstall --no-cache-dir llama-cpp-python"
    ) from error

log = logging.getLogger(__name__)

EXACT_FORMATS = ("F32", "Q8_0")
"""Weights whose products llama.cpp's CPU kernels compute alike for any number of rows, as measured."""


class LlamaCppRunner(BaseLLMRunner):
    """Runs a GGUF model with continuous batching on llama.cpp's own API."""

    config_type = LlamaCppConfig
    ticks = True
    joinable = True
    honours = sequence.OPTIONS | sampler.OPTIONS
    config: LlamaCppConfig
    _model: Model | None = None
    _engine: Engine | None = None

    def _initialize_model(self) -> None:
        path = self._find_model()
        repack = probe(path, self.config)
        self._device_bytes_before = devices.gpu_memory()[0]
        self._model = model = Model(path, self.config, self._offload, self.device.index, repack)
        executor = self._executor(model)
        self._engine = Engine(executor, self.config, self._limit)
        log.info("%s: %s on %s, rows of at most %d tokens", path.name, model.describe(), self._where, self._limit)
        self._caveat = self._reproducibility_caveat()
        if self.config.reproducible and self._caveat:
            log.warning("backend.reproducible=true, but %s", self._caveat)

    def _preview_model(self) -> Preview:
        path = self._find_model()
        probe(path, self.config, weights=False)
        self._model = model = Vocabulary(path, self.config, self._offload, self.device.index)
        executor = self._executor(model)
        executor.footprint = replace(executor.footprint, mapped_bytes=model.size_bytes)
        return Preview(
            model_type=model.describe(),
            device=self._where,
            context=self._limit,
            footprint=executor.footprint,
            sizes=lambda waiting: executor.sizes(waiting, self._limit),
        )

    def _find_model(self) -> Path:
        """Return the model's file, having checked what can be checked before it is read."""
        llama_log.capture()
        llama_cpp.llama_backend_init()
        config = self.config
        self._offload = can_offload(self.device)
        if not self._offload and (config.n_gpu_layers or config.tensor_split):
            raise LLMConfigError("backend.n_gpu_layers and tensor_split need a GPU; on this device leave them out")
        limit = llama_cpp.llama_max_parallel_sequences()
        if config.slots != "auto" and config.slots + sizing.PREFIX_SLOTS > limit:
            most = limit - sizing.PREFIX_SLOTS
            raise LLMInitializationError(f"backend.slots={config.slots} is more than {most}, llama.cpp's most")
        self._path = find_gguf(config.model)
        return self._path

    def _executor(self, model: Model) -> LlamaExecutor:
        """Return what computes with the model, and set how many tokens a row may have."""
        self._threads = Threads(self.config)
        self._abort = Abort()
        executor = LlamaExecutor(model, self.config, self._threads, self._offload, self._abort)
        self._limit = self.config.context or min(model.train_context, sizing.most_tokens(executor.footprint))
        stretched = self.config.rope_scaling is not RopeScaling.model or self.config.rope_freq_scale
        if self._limit > model.train_context and not stretched:
            log.warning("backend.context=%d exceeds the %d tokens of training", self._limit, model.train_context)
        return executor

    @property
    def _where(self) -> str:
        return "gpu" if self._offload else "cpu"

    def _reproducibility_caveat(self) -> str | None:
        """Say why answers may still depend on the rows beside them; None where they do not."""
        assert self._model is not None
        kind = self._model.describe()
        if self._offload:
            return "a GPU's kernels are chosen by the batch: rows may differ in the last digits"
        if not any(name in kind for name in EXACT_FORMATS):
            return (
                f"llama.cpp is not known to compute every batch of {kind} alike, only of {' and '.join(EXACT_FORMATS)}"
            )
        return None

    def _release_model(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        if self._model is not None:
            self._model.close()
            self._model = None

    def stream(self, requests: Iterable[Request | None]) -> Iterator[Chunk]:
        """Answer `requests` in `backend.slots` slots; see `BaseLLMRunner.stream`."""
        self._check_loaded()
        assert self._engine is not None and self._model is not None
        self._abort.clear()
        return self._engine.stream(with_stop_tokens(requests, self._model), self.encode, self.tick)

    def encode(self, request: Request) -> tuple[list[int], int]:
        """Return a request's prompt tokens, and how many were cut off on the left to fit the context.

        Raises:
            ValueError: the prompt is empty, exceeds the context, is no text, or the template refuses it.
        """
        assert self._model is not None
        self.check_sampling(request.sampling)
        check_tokens(request.sampling, self._model.n_vocab)
        tokens = tokens_of(request, self.prompt_text, self._model)
        return fit_prompt(tokens, self._limit, request.truncate)

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Return the token ids of a text; see `BaseLLMRunner.tokenize`."""
        with self._resident:
            self._check_loaded()
            assert self._model is not None
            return self._model.tokenize(text, literal=not special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; see `BaseLLMRunner.detokenize`."""
        with self._resident:
            self._check_loaded()
            assert self._model is not None
            tokens = known_tokens(ids, self._model.n_vocab)
            return b"".join(map(self._model.piece, tokens)).decode("utf-8", "replace")

    @property
    def chat_template(self) -> str | None:
        """The template in the file's metadata, or the configured one."""
        return self._model.chat.source if self._model is not None and self._model.chat is not None else None

    def template_for(self, tools: Sequence[Mapping[str, Any]] | None) -> ChatTemplate:
        """Return what renders a chat; see `BaseLLMRunner.template_for`."""
        template = None if self._model is None else self._model.tool_chat if tools else self._model.chat
        if template is None:
            raise ChatTemplateError("the model has no chat template: use prompt=raw or backend.chat_template=FILE")
        return template

    def cancel(self, request_id: int) -> None:
        """Give up a request of the running stream; it ends with an error chunk, and its slots are free at once."""
        if self._engine is not None:
            self._engine.cancel(request_id)

    def interrupt(self) -> None:
        """Give up the step that is being computed, on a CPU; see `BaseLLMRunner.interrupt`."""
        self._abort.set()

    def _device_memory_mb(self) -> tuple[float, float] | None:
        if not self._offload or self._engine is None:
            return None
        used = devices.gpu_memory()[0]
        peak = max(used, self._engine.scheduler.device_bytes)
        return (used - self._device_bytes_before) / 1e6, (peak - self._device_bytes_before) / 1e6

    def facts(self) -> Facts:
        """Say what decides the answers beside the options; see `BaseLLMRunner.facts`."""
        return Facts(
            decides={"commit": hub_commit(self.config.model, self._path)},
            may_decide={"context": self._limit, "llama_cpp_python": llama_cpp.__version__},
            last_digits={"device": self._where, "kernels": llama_cpp.llama_print_system_info().decode().strip()},
        )

    def info(self) -> dict[str, Any]:
        """Say what was loaded and what was chosen."""
        self._check_loaded()
        assert self._model is not None and self._engine is not None
        return {
            "model": self.config.model,
            "model_type": self._model.describe(),
            "parameters": self._model.parameters,
            "device": self._where,
            "threads": self._threads.now,
            "reproducible": self.config.reproducible and not self._caveat,
            **self._engine.info(),
            "llama_cpp_python": llama_cpp.__version__,
        }

"""The contract of a runner, and every convenience written once on top of it.

A backend implements `_initialize_model` and one way to generate: `stream`, which pulls requests when it has room and
yields chunks as they are made, or, where one prompt at a time is all it can do, `_run_streaming`.
"""

from __future__ import annotations

import gc
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Self, TypeVar, cast

import psutil

from llmpipe.config import (
    BackendConfig,
    DeviceConfig,
    DeviceType,
    ModelConfig,
    PromptFormat,
    SamplingConfig,
    build,
)
from llmpipe.exceptions import LLMConfigError, LLMError, LLMInferenceError, LLMInitializationError
from llmpipe.records import Chunk, Completion, Message, Request, complete
from llmpipe.runners.chat import ChatTemplateError

T = TypeVar("T")
Prompt = str | Sequence[Message]
"""A plain prompt, or the messages of a chat."""


class BaseLLMRunner(ABC):
    """A loaded model that answers requests.

    Loading happens in the constructor; `close`, or leaving a `with` block, gives the memory back. One stream runs at
    a time: a second thread waits its turn, and a second stream in the same thread is refused, because it could only
    wait for itself.

    Args:
        config: A backend config, a flat `ModelConfig`, or a dictionary of the backend's options.
        device: Where to run; by default the best device there is.
        sampling: What the conveniences use where a call does not say otherwise.

    Raises:
        LLMConfigError: an option is unknown or out of range.
        LLMInitializationError: the model cannot be found or loaded, or the device is not there.
    """

    config_type: ClassVar[type[BackendConfig]] = BackendConfig
    """The dataclass of this backend's options."""
    config: BackendConfig
    """The options it was loaded with."""

    def __init__(
        self,
        config: BackendConfig | ModelConfig | Mapping[str, Any],
        device: DeviceConfig | DeviceType | str | None = None,
        sampling: SamplingConfig | None = None,
    ) -> None:
        if isinstance(config, ModelConfig):
            device = device or config.device
            sampling = sampling or config.sampling
            config = {"model": config.model_path, **config.options}
        if isinstance(config, Mapping):
            config = cast(BackendConfig, build(self.config_type, config, "backend option"))
        self.config = config
        self.device = DeviceConfig.parse(device)
        self.sampling = sampling or SamplingConfig()
        self.load_s = 0.0
        self.is_loaded = False
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._load()

    # --- what a backend implements --------------------------------------------------------------------------------

    @abstractmethod
    def _initialize_model(self) -> None:
        """Load the model that `self.config` and `self.device` name.

        Raises:
            LLMInitializationError: it cannot be found or loaded, or the device is not there.
        """

    def _release_model(self) -> None:  # noqa: B027  a backend without memory of its own has nothing to do
        """Drop everything `_initialize_model` made."""

    def stream(self, requests: Iterable[Request]) -> Iterator[Chunk]:
        """Answer `requests`, pulling the next when there is room, and yield chunks as they are made, in any order.

        The last chunk of each sample carries its `finish_reason`. A request that cannot be run ends with an error
        chunk; only a fault of the whole runner raises. This default answers one sample at a time through
        `_run_streaming`; a backend that batches overrides it.

        Raises:
            LLMInferenceError: the runner as a whole failed.
        """
        for request in requests:
            try:
                prompt = self.render(request.messages) if request.messages is not None else request.prompt
            except (ChatTemplateError, LLMConfigError) as error:
                yield from error_chunks(request, str(error))
                continue
            for sample in request.samples:
                sampling, count, started_at = request.sampling, 0, time.perf_counter()
                try:
                    for text in self._run_streaming(prompt, sampling.max_tokens, sampling.temperature):
                        count += 1
                        yield Chunk(request.id, sample, text, started_at=started_at)
                except LLMError as error:
                    yield Chunk(request.id, sample, finish_reason="error", error=str(error))
                else:
                    reason = "length" if count >= sampling.max_tokens else "stop"
                    yield Chunk(request.id, sample, finish_reason=reason, completion_tokens=count)

    def _run_streaming(self, prompt: str, max_tokens: int, temperature: float) -> Iterator[str]:
        """Generate for one prompt and yield its tokens' text; for backends that do not override `stream`."""
        raise TypeError(f"{type(self).__name__} must implement stream or _run_streaming")

    @property
    def chat_template(self) -> str | None:
        """The model's chat template, or None where it has none."""
        return None

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt text of a chat; without a template, the messages' text, a line each.

        Raises:
            ChatTemplateError: the template refuses the messages.
        """
        return "\n".join(str(message.get("content", "")) for message in messages)

    def info(self) -> dict[str, Any]:
        """Say what was loaded and where, and what was chosen automatically; goes into a run's metrics."""
        return {"model": self.config.model, "device": str(self.device)}

    def _device_memory_mb(self) -> tuple[float, float] | None:
        """Return the device memory in use and its peak since loading, in MB; None where it is the host's."""
        return None

    # --- conveniences ---------------------------------------------------------------------------------------------

    def request(self, prompt: Prompt, id: int = 0, prompt_format: str = "auto", **sampling: Any) -> Request:
        """Make the request for one prompt with this runner's sampling options, changed by `sampling`.

        Raises:
            LLMConfigError: an option is unknown, or `chat` is asked of a model without a chat template.
        """
        options = self.sampling.replace(sampling)
        seed = options.seed if options.seed is not None else 0
        samples = tuple(range(options.n))
        if isinstance(prompt, str):
            if not self.is_chat(prompt_format):
                return Request(id, options, prompt=prompt, seed=seed, samples=samples)
            prompt = [{"role": "user", "content": prompt}]
        return Request(id, options, messages=tuple(dict(m) for m in prompt), seed=seed, samples=samples)

    def is_chat(self, prompt_format: PromptFormat | str) -> bool:
        """Say whether a plain prompt becomes a chat under `auto`, `chat` or `raw`.

        Raises:
            LLMConfigError: the format is unknown, or `chat` is asked of a model without a chat template.
        """
        if prompt_format not in [member.value for member in PromptFormat]:
            raise LLMConfigError(f"prompt format {prompt_format!r} is not allowed; it must be auto, chat or raw")
        if prompt_format == "chat" and self.chat_template is None:
            raise LLMConfigError(
                f"prompt=chat, but {self.config.model} has no chat template: "
                f"use prompt=raw or backend.chat_template=FILE"
            )
        return prompt_format == "chat" or (prompt_format == "auto" and self.chat_template is not None)

    def run(self, prompts: Iterable[Prompt | Request], **sampling: Any) -> list[Completion]:
        """Answer many prompts in batches; completions come back in the order of `prompts`, n for each.

        A prompt that cannot be run has a completion with `error` set.
        """
        requests = (
            replace(p, id=i) if isinstance(p, Request) else self.request(p, id=i, **sampling)
            for i, p in enumerate(prompts)
        )
        done = list(self.completions(requests))
        return sorted(done, key=lambda completion: (completion.request_id, completion.sample))

    def completions(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer `requests` and yield each sample's completion, with its times, as it finishes."""
        return self._exclusively(complete(self.stream, requests))

    def generate_text(self, prompt: Prompt, prompt_format: str = "auto", **sampling: Any) -> str:
        """Answer one prompt and return the text.

        Args:
            prompt: Text, or the messages of a chat.
            prompt_format: `auto`, `chat` or `raw`: what a plain text becomes.
            **sampling: Options of `SamplingConfig`, such as `temperature=0` or `max_tokens=20`.

        Raises:
            LLMConfigError: an option is unknown or out of range.
            LLMInferenceError: the prompt cannot be run, for instance because it exceeds the context.
        """
        return "".join(self.generate_text_streaming(prompt, prompt_format, **sampling))

    def generate_text_streaming(self, prompt: Prompt, prompt_format: str = "auto", **sampling: Any) -> Iterator[str]:
        """Answer one prompt and yield its text as it is generated; arguments and errors as in `generate_text`."""
        request = replace(self.request(prompt, prompt_format=prompt_format, **sampling), samples=(0,))
        return (chunk.text for chunk in self._raising(request) if chunk.text)

    def create_chat_completion(
        self,
        messages: Sequence[Message],
        stream: bool = False,
        stream_options: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Any:
        """Answer a chat in OpenAI's format.

        Args:
            messages: The chat so far, each a dictionary with `role` and `content`.
            stream: Return an iterator of `chat.completion.chunk` dictionaries instead of one `chat.completion`.
            stream_options: `{"include_usage": True}` ends the stream with a chunk that carries the usage.
            **sampling: Options of `SamplingConfig`; `max_completion_tokens` is accepted for `max_tokens`.

        Raises:
            LLMConfigError: an option is unknown or out of range.
            LLMInferenceError: the chat cannot be run.
        """
        if "max_completion_tokens" in sampling:
            sampling["max_tokens"] = sampling.pop("max_completion_tokens")
        if isinstance(messages, str) or not messages:
            raise LLMConfigError(f"messages={messages!r} is not allowed; it must be a non-empty list of messages")
        request = self.request(messages, **{k: v for k, v in sampling.items() if v is not None})
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.config.model}
        if stream:
            return self._chat_chunks(request, head, bool((stream_options or {}).get("include_usage")))
        done = sorted(self.completions([request]), key=lambda completion: completion.sample)
        for completion in done:
            if completion.error:
                raise LLMInferenceError(completion.error)
        choices = [
            {
                "index": c.sample,
                "message": {"role": "assistant", "content": c.text},
                "logprobs": None,
                "finish_reason": c.finish_reason,
            }
            for c in done
        ]
        usage = _usage(done[0].prompt_tokens, sum(c.completion_tokens or 0 for c in done))
        return {**head, "object": "chat.completion", "choices": choices, "usage": usage}

    def _chat_chunks(self, request: Request, head: dict[str, Any], include_usage: bool) -> Iterator[dict[str, Any]]:
        head = {**head, "object": "chat.completion.chunk"}
        prompt_tokens, completion_tokens = 0, 0
        begun: set[int] = set()
        for chunk in self._raising(request):
            prompt_tokens = chunk.prompt_tokens or prompt_tokens
            completion_tokens += chunk.completion_tokens or 0
            delta: dict[str, str] = {}
            if chunk.sample not in begun:
                begun.add(chunk.sample)
                delta["role"] = "assistant"
            if chunk.text or "role" in delta:
                delta["content"] = chunk.text
            if not delta and chunk.finish_reason is None:
                continue
            # OpenAI's streams name the reason in a chunk of its own, after the last text.
            if delta:
                yield {**head, "choices": [_choice(chunk.sample, delta, None)]}
            if chunk.finish_reason is not None:
                yield {**head, "choices": [_choice(chunk.sample, {}, chunk.finish_reason)]}
        if include_usage:
            yield {**head, "choices": [], "usage": _usage(prompt_tokens, completion_tokens)}

    def _raising(self, request: Request) -> Iterator[Chunk]:
        """Stream one request; an error chunk raises."""
        for chunk in self._exclusively(self.stream([request])):
            if chunk.finish_reason == "error":
                raise LLMInferenceError(chunk.error)
            yield chunk

    # --- state ----------------------------------------------------------------------------------------------------

    def reload(self, model: str | None = None, device: DeviceConfig | DeviceType | str | None = None) -> None:
        """Give the memory back and load again, with another model or device where one is named.

        Raises:
            LLMInitializationError: as when loading; the runner is then closed.
        """
        self.close()
        if model is not None:
            self.config = replace(self.config, model=str(model))
        if device is not None:
            self.device = DeviceConfig.parse(device)
        self._load()

    def close(self) -> None:
        """Give the model's memory back. A closed runner can be reloaded; closing twice is fine."""
        with self._turn():
            if self.is_loaded:
                self.is_loaded = False
                self._release_model()
                gc.collect()

    def memory_usage(self) -> dict[str, float | None]:
        """Return resident memory of this process and, where the model is on a device, memory there, in MB (10^6 B)."""
        device = self._device_memory_mb() if self.is_loaded else None
        return {
            "rss_mb": psutil.Process().memory_info().rss / 1e6,
            "device_mb": device[0] if device else None,
            "peak_device_mb": device[1] if device else None,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _load(self) -> None:
        started = time.perf_counter()
        try:
            self._initialize_model()
        except LLMError:
            self._release_model()
            raise
        except Exception as error:
            self._release_model()
            message = f"{type(self).__name__} cannot load {self.config.model!r}: {_one_line(error)}"
            raise LLMInitializationError(message) from error
        self.load_s = time.perf_counter() - started
        self.is_loaded = True

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the runner; wait for other threads, refuse to wait for oneself."""
        if self._holder == threading.get_ident():
            raise LLMInferenceError("this runner is busy with a stream of this thread: exhaust or close that one first")
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None

    def _exclusively(self, items: Iterator[T]) -> Iterator[T]:
        with self._turn():
            if not self.is_loaded:
                raise LLMInferenceError("this runner is closed: call reload() first")
            try:
                yield from items
            finally:
                close = getattr(items, "close", None)
                if close is not None:
                    close()


def error_chunks(request: Request, reason: str) -> Iterator[Chunk]:
    """Yield the chunks that end every sample of a request that cannot be run."""
    for sample in request.samples:
        yield Chunk(request.id, sample, finish_reason="error", error=reason)


def _choice(index: int, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _usage(prompt_tokens: int | None, completion_tokens: int) -> dict[str, int]:
    prompt = prompt_tokens or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt + completion_tokens,
    }


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def fit_prompt(tokens: list[int], context: int, truncate: bool) -> tuple[list[int], int]:
    """Return the prompt's tokens and how many were cut off on the left, leaving room for one token of an answer.

    Raises:
        ValueError: the prompt is empty, or exceeds the context and `truncate` is off.
    """
    if not tokens:
        raise ValueError("the prompt is empty: it has no tokens")
    excess = len(tokens) - (context - 1)
    if excess <= 0:
        return tokens, 0
    if not truncate:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens, and the context of {context} leaves room for {context - 1}: "
            f"use a larger backend.context, or prompt.overflow=truncate"
        )
    return tokens[excess:], excess

"""The contract of a runner, and every convenience written once on top of it.

A backend implements `_initialize_model` and one way to generate: `stream`, which pulls requests when it has room and
yields chunks as they are made, or, where one prompt at a time is all it can do, `_run_streaming`.
"""

from __future__ import annotations

import gc
import logging
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

import psutil

from llmpipe.chats import continues, parse_messages, parse_template_kwargs, parse_tools
from llmpipe.config import (
    BackendConfig,
    ControlTokens,
    DeviceConfig,
    DeviceType,
    ModelConfig,
    PromptFormat,
    SamplingConfig,
    auto_or_bool,
    build,
    check,
    reject_unknown,
)
from llmpipe.exceptions import LLMConfigError, LLMError, LLMInferenceError, LLMInitializationError
from llmpipe.records import (
    Chunk,
    Completion,
    Message,
    Request,
    Stopwatch,
    Tick,
    complete,
    derive_seed,
    failed,
    no_tick,
)
from llmpipe.runners.chat import ChatTemplate
from llmpipe.runners.decoding import StopStrings
from llmpipe.runners.facts import Facts
from llmpipe.runners.openai_format import chat_chunks, chat_completion
from llmpipe.runners.rendering import ChatRenderer
from llmpipe.runners.turns import Stream, Turns

if TYPE_CHECKING:
    from llmpipe.runners.preview import Preview

log = logging.getLogger(__name__)

T = TypeVar("T")
_DEFAULT_SAMPLING = SamplingConfig()
Prompt = str | Sequence[Message]
"""A plain prompt, or the messages of a chat."""


class BaseLLMRunner(ABC):
    """A loaded model that answers requests.

    Loading happens in the constructor; `close`, or leaving a `with` block, gives the memory back. One stream runs at
    a time: a second thread waits its turn, and a second stream in the same thread is refused, because it could only
    wait for itself. A stream may go from thread to thread. It is closed when it is dropped, when its thread has ended
    and another call comes, and when the runner is closed and nobody has asked it for more for a second.

    Args:
        config: A backend config, a flat `ModelConfig`, or a dictionary of the backend's options.
        device: Where to run; by default the best device there is.
        sampling: What the conveniences use where a call does not say otherwise.
        weights: Whether to load them. Without, the runner renders and encodes prompts, and `preview` tells of it.

    Raises:
        LLMConfigError: an option is unknown or out of range.
        LLMInitializationError: the model cannot be found or loaded, or the device is not there.
    """

    config_type: ClassVar[type[BackendConfig]] = BackendConfig
    """The dataclass of this backend's options."""
    ticks: ClassVar[bool] = False
    """Whether `stream` calls `tick` by itself, at each of its steps; otherwise that is done after each chunk."""
    config: BackendConfig
    """The options it was loaded with."""

    def __init__(
        self,
        config: BackendConfig | ModelConfig | Mapping[str, Any],
        device: DeviceConfig | DeviceType | str | None = None,
        sampling: SamplingConfig | None = None,
        weights: bool = True,
    ) -> None:
        if isinstance(config, ModelConfig):
            device = device or config.device
            sampling = sampling or config.sampling
        self.config = backend_config(config, self.config_type)
        self.device = DeviceConfig.parse(device)
        self.sampling = sampling or SamplingConfig()
        self.load_s = 0.0
        self.is_loaded = False
        self._turns = Turns()
        self._tick: Tick = no_tick
        self.now = datetime.now().astimezone()
        """The time that chat templates are told; of a run, its start, so that it has the same prompts when resumed."""
        self.renderer = ChatRenderer()
        """Renders chats, and says what of them is worth saying."""
        self.preview: Preview | None = None
        """What is known without the weights, where they are not loaded and the backend can say."""
        self._load(weights)

    # --- what a backend implements --------------------------------------------------------------------------------

    @abstractmethod
    def _initialize_model(self) -> None:
        """Load the model that `self.config` and `self.device` name.

        Raises:
            LLMInitializationError: it cannot be found or loaded, or the device is not there.
        """

    def _preview_model(self) -> Preview | None:
        """Read what can be known without the weights; after it, `chat_template`, `render` and `encode` must work.

        Raises:
            LLMInitializationError: as `_initialize_model`.
        """
        return None

    def _release_model(self) -> None:  # noqa: B027  a backend without memory of its own has nothing to do
        """Drop everything `_initialize_model` made."""

    def stream(self, requests: Iterable[Request]) -> Iterator[Chunk]:
        """Answer `requests`, pulling the next when there is room, and yield chunks as they are made, in any order.

        The last chunk of each sample carries its `finish_reason`. A request that cannot be run ends with an error
        chunk; only a fault of the whole runner raises. This default answers one sample at a time through
        `_run_streaming`; a backend that batches, or takes more sampling options, overrides it. One that computes or
        waits for long without a chunk calls `self.tick()` meanwhile, from the same thread.

        Raises:
            LLMInferenceError: the runner as a whole failed.
        """
        for request in requests:
            try:
                self._check_simple(request.sampling)
                prompt = self.prompt_text(request)
            except (ValueError, RecursionError) as error:
                yield from error_chunks(request, str(error))
                continue
            for sample in request.samples:
                try:
                    yield from self._stream_simply(request, sample, prompt)
                except Exception as error:  # whatever befalls one prompt, the next one may fare better
                    log.debug("request %d failed", request.id, exc_info=True)
                    yield Chunk(request.id, sample, finish_reason="error", error=_one_line(error))

    def tick(self) -> None:
        """Let whoever drives the stream look at the clock and at signals; what this raises is to end the stream."""
        self._tick()

    def interrupt(self) -> None:  # noqa: B027  most steps are short
        """Give up the step of `stream` that is being computed, where that can be done; the stream may raise anything.

        Called from another thread, when the stream is to end and no `tick` comes.
        """

    def _run_streaming(self, prompt: str, max_tokens: int, temperature: float) -> Iterator[str]:
        """Generate for one prompt and yield its tokens' text; for backends that do not override `stream`."""
        raise NotImplementedError(f"{type(self).__name__} must implement stream or _run_streaming")

    def _check_simple(self, sampling: SamplingConfig) -> None:
        """Refuse what `_run_streaming` would not be told of."""
        taken = ("temperature", "max_tokens", "stop", "n")
        for f in fields(SamplingConfig):
            default, value = getattr(_DEFAULT_SAMPLING, f.name), getattr(sampling, f.name)
            if f.name not in taken and value != default:
                raise LLMConfigError(
                    f"{type(self).__name__} cannot honour sampling.{f.name}={value!r}: it takes {', '.join(taken)}"
                )

    def _stream_simply(self, request: Request, sample: int, prompt: str) -> Iterator[Chunk]:
        sampling, count, started_at = request.sampling, 0, time.perf_counter()
        stops = StopStrings(sampling.stop)
        for text in self._run_streaming(prompt, sampling.max_tokens, sampling.temperature):
            count += 1
            yield Chunk(request.id, sample, stops.push(text), started_at=started_at)
            if stops.stopped:
                break
        reason = "length" if count >= sampling.max_tokens and not stops.stopped else "stop"
        yield Chunk(request.id, sample, stops.flush(), reason, completion_tokens=count, started_at=started_at)

    @property
    def chat_template(self) -> str | None:
        """The model's chat template, or None where it has none."""
        return None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final: bool = False,
    ) -> str:
        """Return the prompt text of a chat; without a template, the messages' text, a line each.

        Args:
            messages: The chat.
            tools: What the model may call, in OpenAI's format.
            template_kwargs: Further names that the template may ask for, such as `enable_thinking`.
            continue_final: End with the text of the last message, which the answer continues.

        Raises:
            ValueError: they are no chat, or the template refuses it.
        """
        chat, tools = parse_messages(messages, any_role=True), parse_tools(tools)
        template = self.template_for(tools)
        if template is None:
            return "\n".join(message["content"] for message in chat)
        kwargs = parse_template_kwargs(template_kwargs)
        return self.renderer.render(template, chat, tools, kwargs, continue_final, self.now)

    def template_for(self, tools: Sequence[Mapping[str, Any]] | None) -> ChatTemplate | None:
        """Return what renders a chat in which these tools are given; None for a backend without chat templates.

        Raises:
            ChatTemplateError: the model has none.
        """
        return None

    def prompt_text(self, request: Request) -> str:
        """Return the text that goes to the model: the rendered chat, or the prompt as it is.

        Raises:
            ValueError: it is no chat, or the template refuses it.
        """
        if request.messages is None:
            return request.prompt
        chat = parse_messages(request.messages, any_role=True)
        text = self.render(chat, request.tools, request.template_kwargs, request.continue_final)
        if self.chat_template is not None:
            self.renderer.look_for_dropped(chat, text, request.id)
        return text

    def encode(self, request: Request) -> tuple[list[int], int] | None:
        """Return a request's prompt tokens, and how many were cut off on the left to fit; None where nobody can tell.

        Raises:
            ValueError: the request cannot be run.
        """
        if type(self).stream is BaseLLMRunner.stream:
            self._check_simple(request.sampling)
        self.prompt_text(request)
        return None

    def info(self) -> dict[str, Any]:
        """Say what was loaded and where, and what was chosen automatically; goes into a run's metrics."""
        return {"model": self.config.model, "device": str(self.device)}

    def facts(self) -> Facts:
        """Say what decides its answers beside its options; without the weights, as far as it is known."""
        return Facts()

    def _device_memory_mb(self) -> tuple[float, float] | None:
        """Return the device memory in use and its peak since loading, in MB; None where it is the host's."""
        return None

    # --- conveniences ---------------------------------------------------------------------------------------------

    def request(
        self,
        prompt: Prompt,
        id: int = 0,
        prompt_format: str = "auto",
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final: bool | str = "auto",
        control_tokens: ControlTokens | str = "literal",
        add_bos: bool | str = "auto",
        **sampling: Any,
    ) -> Request:
        """Make the request for one prompt with this runner's sampling options, changed by `sampling`.

        Its seed is derived from `seed=` and `id`: equal calls give equal answers, and many prompts various ones.

        Args:
            prompt: Text, or the messages of a chat.
            id: Names the request among others.
            prompt_format: `auto`, `chat` or `raw`: what a plain text becomes.
            tools: What the model may call in a chat, in OpenAI's format.
            chat_template_kwargs: Further arguments for the chat template, such as `{"enable_thinking": False}`.
            continue_final: Go on with a chat's last message instead of closing it: True, False, or `auto`, which does
                so if the message is the assistant's.
            control_tokens: `literal` or `parse`: what a control token's text is inside of a message.
            add_bos: Whether the prompt begins with BOS: True, False, or `auto`: as the model says, unless the text has
                one already.
            **sampling: Options of `SamplingConfig`.

        Raises:
            LLMConfigError: an option is unknown, the prompt is neither text nor messages, or `chat` is asked of a model
                without a chat template.
            LLMInferenceError: the runner is closed.
        """
        self._check_loaded()
        options = self.sampling.replace(sampling)
        auto_or_bool("continue_final", continue_final)
        auto_or_bool("add_bos", add_bos)
        try:
            tools, kwargs = parse_tools(tools), parse_template_kwargs(chat_template_kwargs)
        except ValueError as error:
            raise LLMConfigError(str(error)) from error
        seed = derive_seed(options.seed or 0, id)
        samples = tuple(range(options.n))
        check(control_tokens in ("literal", "parse"), "control_tokens", control_tokens, "literal or parse")
        how: dict[str, Any] = {"seed": seed, "samples": samples, "literal": control_tokens == "literal"}
        how["add_bos"] = None if add_bos == "auto" else add_bos
        if isinstance(prompt, str):
            if not self.is_chat(prompt_format):
                if tools or kwargs or continue_final is True:
                    raise LLMConfigError("tools, chat_template_kwargs and continue_final need a chat, not a raw prompt")
                return Request(id, options, prompt=prompt, **how)
            messages: Any = [{"role": "user", "content": prompt}]
        else:
            messages = prompt
        if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
            raise LLMConfigError(f"prompt={prompt!r} is not allowed; it must be text or a list of messages")
        return Request(
            id,
            options,
            messages=tuple(dict(m) for m in messages),  # what they hold is looked at when the row's turn comes
            **how,
            tools=tools,
            template_kwargs=kwargs,
            continue_final=continues(continue_final, messages),
        )

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

    def run(self, prompts: Iterable[Prompt | Request], **options: Any) -> list[Completion]:
        """Answer many prompts in batches; completions come back in the order of `prompts`, n for each.

        A prompt that cannot be run has a completion with `error` set.

        Args:
            prompts: Texts, chats, or requests.
            **options: Of `request`: `prompt_format`, `tools`, `chat_template_kwargs`, `continue_final`,
                `control_tokens`, `add_bos`, and options of `SamplingConfig`.

        Raises:
            LLMConfigError: `prompts` is one text, chat or table instead of many prompts, or an option is unknown.
            LLMInferenceError: the runner as a whole failed.
        """
        if isinstance(prompts, (str, bytes, Mapping)) or hasattr(prompts, "iterrows"):
            raise LLMConfigError(
                f"prompts is a {type(prompts).__name__}; it must be a list of prompts, such as [prompt] or "
                f"frame['prompt'].tolist()"
            )
        # What is wrong with the options is wrong with every prompt; what is wrong with a prompt is so with that one.
        self.is_chat(options.get("prompt_format", "auto"))
        samples = self.request([{"role": "user", "content": ""}], **options).samples
        refused: list[Completion] = []

        def requests() -> Iterator[Request]:
            for i, p in enumerate(prompts):
                try:
                    request = replace(p, id=i) if isinstance(p, Request) else self.request(p, id=i, **options)
                except LLMConfigError as error:
                    refused.extend(failed(i, str(error), sample) for sample in samples)
                else:
                    yield request

        done = [*self.completions(requests()), *refused]
        return sorted(done, key=lambda completion: (completion.request_id, completion.sample))

    def completions(
        self, requests: Iterable[Request], tick: Tick = no_tick, stopwatch: Stopwatch | None = None
    ) -> Iterator[Completion]:
        """Answer `requests` and yield each sample's completion, with its times, as it finishes.

        Args:
            requests: What to answer; pulled when there is room.
            tick: Called at each step, also where no sample finishes, and while the runner waits for another process.
                What it raises ends the stream.
            stopwatch: Times the answers; it knows those under way.
        """
        return self._exclusively(complete(self.stream, requests, self.tick, not self.ticks, stopwatch), tick)

    def generate_text(self, prompt: Prompt, prompt_format: str = "auto", **options: Any) -> str:
        """Answer one prompt and return the text.

        Args:
            prompt: Text, or the messages of a chat.
            prompt_format: `auto`, `chat` or `raw`: what a plain text becomes.
            **options: Of `request`: `tools`, `chat_template_kwargs`, `continue_final`, `control_tokens`, `add_bos`, and
                options of `SamplingConfig`, such as `temperature=0`, `max_tokens=20`, or `seed=1` for another sample
                than that of the call before.

        Raises:
            LLMConfigError: an option is unknown or out of range.
            LLMInferenceError: the prompt cannot be run, for instance because it exceeds the context.
        """
        return "".join(self.generate_text_streaming(prompt, prompt_format, **options))

    def generate_text_streaming(self, prompt: Prompt, prompt_format: str = "auto", **options: Any) -> Iterator[str]:
        """Answer one prompt and yield its text as it is generated; arguments and errors as in `generate_text`."""
        request = replace(self.request(prompt, prompt_format=prompt_format, **options), samples=(0,))
        return (chunk.text for chunk in self._raising(request) if chunk.text)

    def create_chat_completion(
        self,
        messages: Sequence[Message],
        stream: bool = False,
        stream_options: Mapping[str, Any] | None = None,
        tool_choice: str | None = None,
        **options: Any,
    ) -> Any:
        """Answer a chat in OpenAI's format.

        Args:
            messages: The chat so far, each a dictionary with `role` and `content`.
            stream: Return an iterator of `chat.completion.chunk` dictionaries instead of one `chat.completion`.
            stream_options: `{"include_usage": True}` ends the stream with a chunk that carries the usage.
            tool_choice: `auto`; or `none`, and the model is not told of the tools.
            **options: Of `request`: `tools`, `chat_template_kwargs`, `continue_final`, `control_tokens`, `add_bos`, and
                options of `SamplingConfig`; `max_completion_tokens` is accepted for `max_tokens`.

        Raises:
            LLMConfigError: an option is unknown or out of range.
            LLMInferenceError: the chat cannot be run.
        """
        options = {name: value for name, value in options.items() if value is not None}  # as OpenAI reads null
        if "max_completion_tokens" in options:
            options["max_tokens"] = options.pop("max_completion_tokens")
        if tool_choice not in (None, "auto", "none"):
            raise LLMConfigError(f"tool_choice={tool_choice!r} is not allowed; it must be 'auto' or 'none'")
        if tool_choice == "none":
            options.pop("tools", None)
        if isinstance(messages, str) or not messages:
            raise LLMConfigError(f"messages={messages!r} is not allowed; it must be a non-empty list of messages")
        request = self.request(messages, **options)
        if stream:
            include_usage = bool((stream_options or {}).get("include_usage"))
            return chat_chunks(self.config.model, self._raising(request), include_usage)
        done = sorted(self.completions([request]), key=lambda completion: completion.sample)
        for completion in done:
            if completion.error:
                raise LLMInferenceError(completion.error)
        return chat_completion(self.config.model, done)

    def _raising(self, request: Request) -> Iterator[Chunk]:
        """Stream one request; an error chunk raises."""
        for chunk in self._exclusively(self.stream([request])):
            if chunk.finish_reason == "error":
                raise LLMInferenceError(chunk.error)
            if chunk.restarts:  # what was streamed cannot be taken back
                raise LLMInferenceError(
                    "the backend crashed or hung in the middle of the answer, or was lost; ask again"
                )
            yield chunk

    # --- state ----------------------------------------------------------------------------------------------------

    def reload(self, model: str | None = None, device: DeviceConfig | DeviceType | str | None = None) -> None:
        """Give the memory back and load again, with another model or device where one is named.

        Raises:
            LLMInitializationError: as when loading; the runner is then closed, and names what it had before, so that
                another `reload()` brings that back.
        """
        before = self.config, self.device
        after_device = self.device if device is None else DeviceConfig.parse(device)
        with self._turns.turn(ends=True):
            self._unload()
            self.device = after_device
            if model is not None:
                self.config = replace(self.config, model=model)
            try:
                self._load()
            except LLMError:
                self.config, self.device = before
                raise

    def close(self) -> None:
        """Give the model's memory back. A closed runner can be reloaded; closing twice is fine."""
        with self._turns.turn(ends=True):
            self._unload()

    def memory_usage(self) -> dict[str, float | None]:
        """Return resident memory of this process and, where the model is on a device, memory there, in MB (10^6 B)."""
        device = self._device_memory_mb() if self.is_loaded else None
        return {
            "rss_mb": self.rss_bytes() / 1e6,
            "device_mb": device[0] if device else None,
            "peak_device_mb": device[1] if device else None,
        }

    def rss_bytes(self) -> int:
        """Return the resident memory of this process, and of another that the model may be in."""
        return int(psutil.Process().memory_info().rss)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _unload(self) -> None:
        if self.is_loaded or self.preview is not None:
            self.is_loaded, self.preview = False, None
            self._release_model()
            gc.collect()

    def _load(self, weights: bool = True) -> None:
        started = time.perf_counter()
        try:
            if weights:
                self._initialize_model()
            else:
                self.preview = self._preview_model()
        except LLMError:
            self._release_model()
            raise
        except Exception as error:
            self._release_model()
            message = f"{type(self).__name__} cannot load {self.config.model!r}: {_one_line(error)}"
            raise LLMInitializationError(message) from error
        self.load_s = time.perf_counter() - started
        self.is_loaded = weights

    def _check_loaded(self) -> None:
        if not self.is_loaded:
            raise LLMInferenceError("this runner is closed: call reload() first")

    def _exclusively(self, items: Iterator[T], tick: Tick = no_tick) -> Stream[T]:
        """Yield `items` while holding the runner, `tick` being its tick; closing what is returned closes `items`."""

        def held(stream: weakref.ref[Stream[T]]) -> Generator[T]:
            with self._turns.turn(stream) as holder:
                self._check_loaded()
                self._tick = tick
                try:
                    for item in items:
                        yield item
                        holder.go_on()
                finally:
                    self._tick = no_tick
                    close = getattr(items, "close", None)
                    if close is not None:
                        close()

        return Stream(held)


def backend_config(
    config: BackendConfig | ModelConfig | Mapping[str, Any], config_type: type[BackendConfig]
) -> BackendConfig:
    """Return the options of a backend, in whichever form they come.

    Raises:
        LLMConfigError: an option is unknown, of the wrong type or out of range.
    """
    if isinstance(config, ModelConfig):
        own = [f.name for f in fields(config_type)]
        reject_unknown(config.options, own, "option", extra=[f.name for f in fields(ModelConfig)])
        config = {"model": config.model_path, **config.options}
    if isinstance(config, Mapping):
        config = cast(BackendConfig, build(config_type, config, "backend option"))
    return config


def error_chunks(request: Request, reason: str) -> Iterator[Chunk]:
    """Yield the chunks that end every sample of a request that cannot be run."""
    for sample in request.samples:
        yield Chunk(request.id, sample, finish_reason="error", error=reason)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

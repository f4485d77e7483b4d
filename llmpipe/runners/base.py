"""The contract of a runner.

A backend implements `_initialize_model` and one way to generate: `stream`, which pulls requests when it has room and
yields chunks as they are made, or, where one prompt at a time is all it can do, `_run_streaming`.

lifecycle.py      the other half of the contract, how a model is loaded; and what follows: reload, close, turns
conveniences.py   requests, completions and text, over `stream`
openai_chat.py    the same in OpenAI's format
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from llmpipe.chats import parse_messages, parse_template_kwargs, parse_tools
from llmpipe.config import SamplingConfig
from llmpipe.exceptions import LLMConfigError, one_line
from llmpipe.records import Chunk, Completion, Message, Request, error_chunk, error_chunks
from llmpipe.runners.chat import ChatTemplate
from llmpipe.runners.decoding import StopStrings
from llmpipe.runners.facts import Facts
from llmpipe.runners.openai_chat import OpenAIChat
from llmpipe.stopwatch import Stopwatch, Tick, complete, no_tick

log = logging.getLogger(__name__)

_DEFAULTS = vars(SamplingConfig())


class BaseLLMRunner(OpenAIChat):
    """A loaded model that answers requests. How it is made and closed is told by `Lifecycle`."""

    ticks: ClassVar[bool] = False
    """Whether `stream` calls `tick` by itself, at each of its steps; otherwise that is done after each chunk."""
    honours: ClassVar[frozenset[str]] = frozenset({"temperature", "max_tokens", "stop", "n"})
    """The sampling options that it honours, by default those that reach `_run_streaming`; see `check_sampling`."""

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
                self.check_sampling(request.sampling)
                prompt = self.prompt_text(request)
            except (ValueError, RecursionError) as error:
                yield from error_chunks(request, str(error))
                continue
            for sample in request.samples:
                try:
                    yield from self._stream_simply(request, sample, prompt)
                except Exception as error:  # whatever befalls one prompt, the next one may fare better
                    log.debug("request %d failed", request.id, exc_info=True)
                    yield error_chunk(request.id, one_line(error), sample)

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

    def check_sampling(self, sampling: SamplingConfig) -> None:
        """Refuse a sampling option that is not one of `honours`, unless it has its default; `stream` asks it of each.

        Raises:
            LLMConfigError: names the option, and those that are honoured.
        """
        for name, default in _DEFAULTS.items():
            if name not in self.honours and (value := getattr(sampling, name)) != default:
                honoured = ", ".join(known for known in _DEFAULTS if known in self.honours)
                raise LLMConfigError(
                    f"{type(self).__name__} cannot honour sampling.{name}={value!r}: it takes {honoured}"
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
            self.check_sampling(request.sampling)
        self.prompt_text(request)
        return None

    def info(self) -> dict[str, Any]:
        """Say what was loaded and where, and what was chosen automatically; goes into a run's metrics."""
        return {"model": self.config.model, "device": str(self.device)}

    def facts(self) -> Facts:
        """Say what decides its answers beside its options; without the weights, as far as it is known."""
        return Facts()

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

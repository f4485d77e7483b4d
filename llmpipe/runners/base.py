"""The contract of a runner.

A backend implements `_initialize_model` and one way to generate: `stream`, which pulls requests when it has room and
yields chunks as they are made, or, where one prompt at a time is all it can do, `_run_streaming`.

lifecycle.py      the other half of the contract, how a model is loaded; and what follows: reload, close, turns
conveniences.py   requests, completions and text, over `stream`
openai_chat.py    the same in OpenAI's format
asynchronous.py   all of these for asyncio
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from llmpipe.chats import ChatInput, parse_messages, parse_template_kwargs, parse_tools
from llmpipe.config import SamplingConfig
from llmpipe.exceptions import LLMConfigError, LLMInferenceError, one_line
from llmpipe.records import Chunk, Completion, Message, Request, error_chunk, error_chunks
from llmpipe.runners.asynchronous import AsyncConveniences
from llmpipe.runners.chat import ChatTemplate
from llmpipe.runners.decoding import StopStrings
from llmpipe.runners.driver import NOBODY, Driver
from llmpipe.runners.facts import Facts
from llmpipe.runners.turns import Holder, Stream
from llmpipe.stopwatch import Stopwatch, complete

log = logging.getLogger(__name__)

_DEFAULTS = vars(SamplingConfig())


class BaseLLMRunner(AsyncConveniences):
    """A loaded model that answers requests. How it is made and closed is told by `Lifecycle`."""

    ticks: ClassVar[bool] = False
    """Whether `stream` calls `tick` by itself, at each of its steps; otherwise that is done after each chunk."""
    joinable: bool = False
    """Whether requests may join a running `stream`: it takes None among them for "none just now", and asks again."""
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
        self._driver.tick()

    def cancel(self, request_id: int) -> None:  # noqa: B027  where that cannot be done, the answer is finished
        """Give up a request of the running stream: where that can be done, it ends with an error chunk, soon.

        May be called from another thread. A request that is not in the stream is ignored.
        """

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
        chat, kwargs = parse_messages(messages, any_role=True), parse_template_kwargs(template_kwargs)
        return self._render(ChatInput(chat, parse_tools(tools), kwargs, continue_final, self.now))

    def _render(self, chat: ChatInput) -> str:
        """Return the prompt text of a chat that has been looked at; see `render`."""
        template = self.template_for(chat.tools)
        if template is None:
            return "\n".join(message["content"] for message in chat.messages)
        return self.renderer.render(template, chat)

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

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Return the token ids of a text and nothing around them, such as BOS.

        Args:
            text: Any text.
            special: Whether control tokens that it spells are those tokens, as in a raw prompt, and not text.

        Raises:
            LLMInferenceError: this backend has no tokens.
            ValueError: it is no text that UTF-8 can hold.
        """
        raise LLMInferenceError(f"{type(self).__name__} has no tokens that could be told")

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; control tokens have none, bytes of no character become U+FFFD.

        Raises:
            LLMInferenceError: this backend has no tokens.
            ValueError: an id is none of the model's.
        """
        raise LLMInferenceError(f"{type(self).__name__} has no tokens that could be told")

    def info(self) -> dict[str, Any]:
        """Say what was loaded and where, and what was chosen automatically; goes into a run's metrics."""
        return {"model": self.config.model, "device": str(self.device)}

    def facts(self) -> Facts:
        """Say what decides its answers beside its options; without the weights, as far as it is known."""
        return Facts()

    def completions(
        self, requests: Iterable[Request], driver: Driver = NOBODY, stopwatch: Stopwatch | None = None
    ) -> Iterator[Completion]:
        """Answer `requests` and yield each sample's completion, with its times, as it finishes.

        Args:
            requests: What to answer; pulled when there is room.
            driver: Whose `tick` is called at each step, also where no sample finishes, and while the runner waits for
                another process.
            stopwatch: Times the answers; it knows those under way.
        """
        return self._exclusively(complete(self._ticking, requests, self.tick, stopwatch), driver)

    def driven(
        self, requests: Iterable[Request | None], driver: Driver = NOBODY, place: Holder | None = None
    ) -> Stream[Chunk]:
        """Yield the chunks of `stream` while holding the runner, which `driver` drives, as in `completions`.

        Args:
            requests: What to answer; None among them, if it is `joinable`, where there is none just now.
            driver: As in `completions`.
            place: One among those who wait for the runner, taken before.
        """
        return self._exclusively(self._ticking(requests), driver, place)

    def _ticking(self, requests: Iterable[Request | None]) -> Iterator[Chunk]:
        """Stream, once it has its turn, with a tick after each chunk where the backend does not see to that itself."""
        chunks = self.stream(requests)  # type: ignore[arg-type]  # there is None only if it is joinable
        try:
            for chunk in chunks:
                yield chunk
                if not self.ticks:
                    self.tick()
        finally:
            if isinstance(chunks, Generator):
                chunks.close()

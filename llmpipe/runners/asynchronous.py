"""The conveniences for asyncio: tasks of any number of event loops share the runner's batch."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import replace
from typing import Literal, Unpack, overload

from llmpipe.records import Chunk, Completion, Request
from llmpipe.runners.conveniences import ChatOptions, Prompt, RequestOptions, unbroken
from llmpipe.runners.driver import NOBODY, Driver
from llmpipe.runners.openai_chat import Messages, OpenAIChat, ToolChoice, answered
from llmpipe.runners.openai_format import (
    ChatChunks,
    ChatCompletion,
    ChatCompletionChunk,
    StreamOptions,
    chat_completion,
)
from llmpipe.runners.turns import Holder, Stream
from llmpipe.stopwatch import Stopwatch


class AsyncConveniences(OpenAIChat):
    """Adds `agenerate`, `astream` and `acreate_chat_completion`.

    Their requests join those in flight. A task that is cancelled gives up its request, and so does leaving a stream.
    Calls that are not asynchronous, and open streams, take turns with all of these together: such a call waits until
    the requests before it are answered, and those after it wait for that. The thread of an event loop that has a
    stream of another kind open is refused, because it could only wait for itself.
    """

    joinable: bool

    @abstractmethod
    def driven(
        self, requests: Iterable[Request | None], driver: Driver = NOBODY, place: Holder | None = None
    ) -> Stream[Chunk]:
        """See `BaseLLMRunner`."""

    @abstractmethod
    def cancel(self, request_id: int) -> None:
        """See `BaseLLMRunner`."""

    async def agenerate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> str:
        """Answer one prompt and return the text; see `generate_text`.

        Raises:
            LLMConfigError: an option is unknown or out of range.
            LLMInferenceError: the prompt cannot be run, or the runner was closed.
        """
        completions = await self._acompletions(replace(self.request(prompt, **options), samples=(0,)))
        return completions[0].text or ""

    def astream(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> AsyncGenerator[str]:
        """Answer one prompt and yield its text as it is generated; errors as in `agenerate`."""
        return self._atexts(replace(self.request(prompt, **options), samples=(0,)))

    @overload
    async def acreate_chat_completion(
        self,
        messages: Messages,
        stream: Literal[False] = False,
        stream_options: StreamOptions | None = None,
        tool_choice: ToolChoice | None = None,
        max_completion_tokens: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion: ...

    @overload
    async def acreate_chat_completion(
        self,
        messages: Messages,
        stream: Literal[True],
        stream_options: StreamOptions | None = None,
        tool_choice: ToolChoice | None = None,
        max_completion_tokens: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncGenerator[ChatCompletionChunk]: ...

    @overload
    async def acreate_chat_completion(
        self,
        messages: Messages,
        stream: bool,
        stream_options: StreamOptions | None = None,
        tool_choice: ToolChoice | None = None,
        max_completion_tokens: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion | AsyncGenerator[ChatCompletionChunk]: ...

    async def acreate_chat_completion(
        self,
        messages: Messages,
        stream: bool = False,
        stream_options: StreamOptions | None = None,
        tool_choice: ToolChoice | None = None,
        max_completion_tokens: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion | AsyncGenerator[ChatCompletionChunk]:
        """Answer a chat in OpenAI's format; arguments and errors as in `create_chat_completion`."""
        request = self._chat_request(messages, tool_choice, max_completion_tokens, options)
        if stream:
            return self._achat_chunks(request, stream_options)
        return chat_completion(self.config.model, await self._acompletions(request))

    # --- chunks ---------------------------------------------------------------------------------------------------

    async def _acompletions(self, request: Request) -> list[Completion]:
        """Return the completions of a request, one for each of its samples."""
        stopwatch = Stopwatch()
        [request] = stopwatch.watch([request])
        async with aclosing(self._achunks(request)) as chunks:
            return [answered(found) async for chunk in chunks if (found := stopwatch.add(chunk)) is not None]

    async def _atexts(self, request: Request) -> AsyncGenerator[str]:
        async with aclosing(self._achunks(request)) as chunks:
            async for chunk in chunks:
                if text := unbroken(chunk).text:
                    yield text

    async def _achat_chunks(
        self, request: Request, options: StreamOptions | None
    ) -> AsyncGenerator[ChatCompletionChunk]:
        stream = ChatChunks(self.config.model, options)
        async with aclosing(self._achunks(request)) as chunks:
            async for chunk in chunks:
                for found in stream.of(unbroken(chunk)):
                    yield found
        for found in stream.end():
            yield found

    async def _achunks(self, request: Request) -> AsyncGenerator[Chunk]:
        """Yield a request's chunks; whoever ends this before it is done has given it up."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Chunk | BaseException] = asyncio.Queue()

        def give(chunk: Chunk | BaseException) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, chunk)

        call = self._stepper.submit(self, request, give)
        try:
            ends = len(request.samples)
            while ends:
                chunk = await queue.get()
                if isinstance(chunk, BaseException):
                    raise chunk
                ends -= chunk.finish_reason is not None
                yield replace(chunk, request_id=request.id)
        finally:
            self._stepper.leave(self, call)

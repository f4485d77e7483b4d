"""Completions and chunks → the dictionaries of OpenAI's chat API. Knows nothing of models."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NotRequired, TypedDict, cast

from llmpipe.records import Chunk, Completion

FinishReason = Literal["stop", "length"]


class Usage(TypedDict):
    """Tokens of a request, all its choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessage(TypedDict):
    """An answer, as it can be put among the messages of the next call."""

    role: Literal["assistant"]
    content: str


class Choice(TypedDict):
    """One answer of several."""

    index: int
    message: ChatMessage
    logprobs: None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """What `create_chat_completion` returns."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(TypedDict, total=False):
    """What a chunk adds to the message."""

    role: Literal["assistant"]
    content: str


class ChunkChoice(TypedDict):
    """What a chunk adds to one answer."""

    index: int
    delta: Delta
    logprobs: None
    finish_reason: FinishReason | None


class ChatCompletionChunk(TypedDict):
    """What `create_chat_completion` yields with `stream=True`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage]


class StreamOptions(TypedDict, total=False):
    """Options of a streamed chat completion."""

    include_usage: bool


def chat_completion(model: str, completions: Sequence[Completion]) -> ChatCompletion:
    """Return the `chat.completion` of one request, a choice for each of its samples; none may have failed."""
    choices: list[Choice] = [
        {
            "index": completion.sample,
            "message": {"role": "assistant", "content": completion.text or ""},
            "logprobs": None,
            "finish_reason": cast(FinishReason, completion.finish_reason),
        }
        for completion in sorted(completions, key=lambda completion: completion.sample)
    ]
    completion_tokens = sum(completion.completion_tokens or 0 for completion in completions)
    return {
        "id": _new_id(),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": _usage(completions[0].prompt_tokens, completion_tokens),
    }


class ChatChunks:
    """Makes the `chat.completion.chunk` dictionaries of one request.

    As in OpenAI's streams, a choice's first delta names the role, its reason to end comes in a chunk of its own after
    the last text, and the usage, where it is asked for, in a chunk without choices at the very end.
    """

    def __init__(self, model: str, options: StreamOptions | None) -> None:
        self._model = model
        self._include_usage = bool((options or {}).get("include_usage"))
        self._id, self._created = _new_id(), int(time.time())
        self._prompt_tokens, self._completion_tokens = 0, 0
        self._begun: set[int] = set()

    def of(self, chunk: Chunk) -> Iterator[ChatCompletionChunk]:
        """Yield what one chunk becomes."""
        self._prompt_tokens = chunk.prompt_tokens or self._prompt_tokens
        self._completion_tokens += chunk.completion_tokens or 0
        if chunk.sample not in self._begun:
            self._begun.add(chunk.sample)
            yield self._chunk(_choice(chunk.sample, {"role": "assistant", "content": chunk.text}))
        elif chunk.text:
            yield self._chunk(_choice(chunk.sample, {"content": chunk.text}))
        if chunk.finish_reason is not None:
            yield self._chunk(_choice(chunk.sample, {}, chunk.finish_reason))

    def end(self) -> Iterator[ChatCompletionChunk]:
        """Yield what comes after the last chunk."""
        if self._include_usage:
            yield {**self._chunk(), "usage": _usage(self._prompt_tokens, self._completion_tokens)}

    def _chunk(self, *choices: ChunkChoice) -> ChatCompletionChunk:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": list(choices),
        }


def chat_chunks(model: str, chunks: Iterable[Chunk], options: StreamOptions | None) -> Iterator[ChatCompletionChunk]:
    """Yield the `chat.completion.chunk` dictionaries of one request; see `ChatChunks`."""
    stream = ChatChunks(model, options)
    for chunk in chunks:
        yield from stream.of(chunk)
    yield from stream.end()


def _choice(index: int, delta: Delta, finish_reason: str | None = None) -> ChunkChoice:
    reason = cast(FinishReason | None, finish_reason)
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def _usage(prompt_tokens: int | None, completion_tokens: int) -> Usage:
    prompt = prompt_tokens or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt + completion_tokens,
    }

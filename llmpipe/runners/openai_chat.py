"""OpenAI's chat API on a runner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Unpack, cast, overload

from llmpipe.exceptions import LLMConfigError, LLMInferenceError
from llmpipe.records import Completion, Request
from llmpipe.runners.conveniences import ChatOptions, Conveniences
from llmpipe.runners.openai_format import (
    ChatCompletion,
    ChatCompletionChunk,
    StreamOptions,
    chat_chunks,
    chat_completion,
)

Messages = Sequence[Mapping[str, Any]]
ToolChoice = Literal["auto", "none"]


class OpenAIChat(Conveniences):
    """Adds `create_chat_completion`."""

    @overload
    def create_chat_completion(
        self,
        messages: Messages,
        stream: Literal[False] = False,
        stream_options: StreamOptions | None = None,
        tool_choice: ToolChoice | None = None,
        max_completion_tokens: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion: ...

    @overload
    def create_chat_completion(
        self,
        messages: Messages,
        stream: Literal[True],
        stream_options: StreamOptions | None = None,
        tool_choice: ToolChoice | None = None,
        max_completion_tokens: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> Iterator[ChatCompletionChunk]: ...

    @overload
    def create_chat_completion(
        self,
        messages: Messages,
        stream: bool,
        stream_options: StreamOptions | None = None,
        tool_choice: ToolChoice | None = None,
        max_completion_tokens: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion | Iterator[ChatCompletionChunk]: ...

    def create_chat_completion(
        self,
        messages: Messages,
        stream: bool = False,
        stream_options: StreamOptions | None = None,
        tool_choice: ToolChoice | None = None,
        max_completion_tokens: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion | Iterator[ChatCompletionChunk]:
        """Answer a chat in OpenAI's format.

        Args:
            messages: The chat so far, each a dictionary with `role` and `content`.
            stream: Return an iterator of `chat.completion.chunk` dictionaries instead of one `chat.completion`.
            stream_options: `{"include_usage": True}` ends the stream with a chunk that carries the usage.
            tool_choice: `auto`; or `none`, and the model is not told of the tools.
            max_completion_tokens: As `max_tokens`.
            **options: Of `request`: `tools`, `chat_template_kwargs`, `continue_final`, `control_tokens`, `add_bos`, and
                options of `SamplingConfig`. Those that are None count as not given.

        Raises:
            LLMConfigError: an option is unknown or out of range.
            LLMInferenceError: the chat cannot be run.
        """
        request = self._chat_request(messages, tool_choice, max_completion_tokens, options)
        if stream:
            return chat_chunks(self.config.model, self._raising(request), stream_options)
        return chat_completion(self.config.model, [answered(found) for found in self.completions([request])])

    def _chat_request(
        self,
        messages: Messages,
        tool_choice: ToolChoice | None,
        max_completion_tokens: int | None,
        options: ChatOptions,
    ) -> Request:
        given = {
            **options,
            "max_tokens": options.get("max_tokens") if max_completion_tokens is None else max_completion_tokens,
        }
        given = {name: value for name, value in given.items() if value is not None}  # as OpenAI reads null
        if tool_choice not in (None, "auto", "none"):
            raise LLMConfigError(f"tool_choice={tool_choice!r} is not allowed; it must be 'auto' or 'none'")
        if tool_choice == "none":
            given.pop("tools", None)
        if isinstance(messages, str) or not messages:
            raise LLMConfigError(f"messages={messages!r} is not allowed; it must be a non-empty list of messages")
        return self.request(messages, **cast(ChatOptions, given))


def answered(completion: Completion) -> Completion:
    """Return a completion that has an answer.

    Raises:
        LLMInferenceError: it says that the request cannot be run.
    """
    if completion.error:
        raise LLMInferenceError(completion.error)
    return completion

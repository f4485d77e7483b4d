"""OpenAI's chat API on a runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmpipe.exceptions import LLMConfigError, LLMInferenceError
from llmpipe.records import Message
from llmpipe.runners.conveniences import Conveniences
from llmpipe.runners.openai_format import chat_chunks, chat_completion


class OpenAIChat(Conveniences):
    """Adds `create_chat_completion`."""

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

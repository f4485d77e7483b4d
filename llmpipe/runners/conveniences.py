"""What a person calls to have prompts answered: written once, over the stream of any backend."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Unpack

from llmpipe.chats import continues, parse_template_kwargs, parse_tools
from llmpipe.config import ControlTokens, PromptFormat, SamplingOptions, auto_or_bool, check
from llmpipe.exceptions import LLMConfigError, LLMInferenceError
from llmpipe.records import Chunk, Completion, Request, failed
from llmpipe.runners.driver import NOBODY, Driver
from llmpipe.runners.lifecycle import Lifecycle
from llmpipe.seeds import derive_seed
from llmpipe.stopwatch import Stopwatch

Prompt = str | Sequence[Mapping[str, Any]]
"""A plain prompt, or the messages of a chat."""
PromptKind = PromptFormat | Literal["auto", "chat", "raw"]


class ChatOptions(SamplingOptions, total=False):
    """What a call may say of a chat beside its messages; see `Conveniences.request`."""

    tools: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None
    continue_final: bool | Literal["auto"]
    control_tokens: ControlTokens | Literal["literal", "parse"]
    add_bos: bool | Literal["auto"]


class RequestOptions(ChatOptions, total=False):
    """What a call may say of a prompt; see `Conveniences.request`."""

    prompt_format: PromptKind


class Conveniences(Lifecycle):
    """Requests, completions and text; what `BaseLLMRunner` adds is how they come about."""

    @property
    @abstractmethod
    def chat_template(self) -> str | None:
        """See `BaseLLMRunner`."""

    @abstractmethod
    def _ticking(self, requests: Iterable[Request | None]) -> Iterator[Chunk]:
        """See `BaseLLMRunner`."""

    @abstractmethod
    def completions(
        self, requests: Iterable[Request], driver: Driver = NOBODY, stopwatch: Stopwatch | None = None
    ) -> Iterator[Completion]:
        """See `BaseLLMRunner`."""

    def request(
        self,
        prompt: Prompt,
        id: int = 0,
        prompt_format: PromptKind = "auto",
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final: bool | Literal["auto"] = "auto",
        control_tokens: ControlTokens | Literal["literal", "parse"] = "literal",
        add_bos: bool | Literal["auto"] = "auto",
        **sampling: Unpack[SamplingOptions],
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

    def run(self, prompts: Iterable[Prompt | Request], **options: Unpack[RequestOptions]) -> list[Completion]:
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

    def generate_text(
        self,
        prompt: Prompt,
        prompt_format: PromptKind = "auto",
        **options: Unpack[ChatOptions],
    ) -> str:
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

    def generate_text_streaming(
        self,
        prompt: Prompt,
        prompt_format: PromptKind = "auto",
        **options: Unpack[ChatOptions],
    ) -> Iterator[str]:
        """Answer one prompt and yield its text as it is generated; arguments and errors as in `generate_text`."""
        request = replace(self.request(prompt, prompt_format=prompt_format, **options), samples=(0,))
        return (chunk.text for chunk in self._raising(request) if chunk.text)

    def _raising(self, request: Request) -> Iterator[Chunk]:
        """Stream one request; an error chunk raises, and so does the end of the stream before that of a sample."""
        return self._exclusively(self._until_ended(request))

    def _until_ended(self, request: Request) -> Iterator[Chunk]:
        stopwatch = Stopwatch()
        for chunk in self._ticking(stopwatch.watch([request])):
            stopwatch.add(chunk)
            yield unbroken(chunk)
        for completion in stopwatch.abandoned():
            raise LLMInferenceError(completion.error)


def unbroken(chunk: Chunk) -> Chunk:
    """Return a chunk for somebody who has read all before it.

    Raises:
        LLMInferenceError: it says that the request cannot be run, or takes back what came before.
    """
    if chunk.finish_reason == "error":
        raise LLMInferenceError(chunk.error)
    if chunk.restarts:
        raise LLMInferenceError("the backend crashed or hung in the middle of the answer, or was lost; ask again")
    return chunk

"""Messages → prompt text, by a model's own Jinja template, in a sandbox with limits on time and size.

Gives the text that `tokenizer.apply_chat_template` of transformers
gives for the same template. Text from a dataset is only ever a value, never a template.
"""

from __future__ import annotations

from contextvars import ContextVar
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser

from llmpipe.chats import ChatInput
from llmpipe.exceptions import LLMConfigError
from llmpipe.records import Message
from llmpipe.redaction import redacted
from llmpipe.runners.templates.code import MOST_SOURCE, BoundedEnvironment
from llmpipe.system.small_files import read_small_text

MOST_REASON = 1000
"""Characters of what a template says when it refuses a chat."""

REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
"""What an assistant's thoughts are called in messages; the first that is there counts."""
MARK = "CONTINUE_FROM_HERE "
"""Stands for a moment behind a message that is to be continued; a template that trims takes its blank away."""
_time: ContextVar[datetime | None] = ContextVar("time", default=None)


class ChatTemplateError(ValueError):
    """The template refuses these messages; the row becomes an error row."""


class GenerationTag(Extension):
    """`{% generation %}`, with which templates mark the assistant's words for training; it changes no text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        """Return what stands between the tag and its end."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja text.
        special_tokens: Values the template may name, such as `bos_token` and `eos_token`.

    Raises:
        LLMConfigError: the text is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: dict[str, str] | None = None) -> None:
        self.source = source
        self._special_tokens = special_tokens or {}
        environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag])
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = strftime_now
        self._environment = environment
        if len(source) > MOST_SOURCE:
            raise LLMConfigError(f"the chat template has {len(source):,} characters, more than {MOST_SOURCE:,}")
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateAssertionError as error:
            raise LLMConfigError(f"the chat template cannot be used, line {error.lineno}: {error.message}") from error
        except jinja2.TemplateSyntaxError as error:
            raise LLMConfigError(
                f"the chat template is not valid Jinja, line {error.lineno}: {error.message}"
            ) from error
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # what Python makes of its code
            reason = str(error) or type(error).__name__
            raise LLMConfigError(f"the chat template cannot be compiled: {reason}") from error

    def render(self, chat: ChatInput) -> str:
        """Render a chat up to where the assistant's answer begins, or goes on.

        Raises:
            ChatTemplateError: the template refuses the messages, or fails on them.
        """
        messages = [_with_reasoning(message) for message in chat.messages]
        final = str(messages[-1].get("content", "")) if chat.continue_final else ""
        if chat.continue_final:
            messages[-1] = {**messages[-1], "content": final + MARK}
        told = _time.set(chat.now)
        try:
            text = self._environment.render(
                self._template,
                {
                    **self._special_tokens,
                    "documents": None,
                    **(chat.template_kwargs or {}),
                    "messages": messages,
                    "add_generation_prompt": not chat.continue_final,
                    "tools": None if chat.tools is None else list(chat.tools),
                },
            )
        except Exception as error:  # a template is a program of the model's: it may fail in any way
            reason = redacted(str(error))[:MOST_REASON]
            raise ChatTemplateError(f"the chat template refuses these messages: {reason}") from error
        finally:
            _time.reset(told)
        return _cut_at_mark(text, final) if chat.continue_final else text


def _with_reasoning(message: Message) -> Message:
    """Give the thoughts before an answer the names that templates have for them, as transformers does."""
    thoughts = next((message[name] for name in REASONING_NAMES if message.get(name) is not None), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


def _cut_at_mark(text: str, final: str) -> str:
    """Return a rendered chat up to the end of its last message, which has the mark behind it.

    The rules are those of `apply_chat_template(continue_final_message=True)` in transformers: where the template trims
    messages, the white space at the end of this one is gone as well.

    Raises:
        ChatTemplateError: the message is not there as it was.
    """
    end = text.rfind(MARK.rstrip())
    before = text[: max(end, 0)]
    if end < 0 or not before.rstrip().endswith(final.strip()):
        raise ChatTemplateError(
            "the chat template drops or alters the last message, which the answer should continue: "
            "use prompt.continue_final=false"
        )
    if text.startswith(MARK, end) or not final.strip():
        return before
    return before.removesuffix(final[len(final.rstrip()) :])


def read_template(text_or_file: str) -> str:
    """Return the template in `text_or_file`: the content of a file of that name, or the text itself.

    Raises:
        LLMConfigError: it looks like a file name, and there is no such file.
    """
    if "{" in text_or_file or "\n" in text_or_file:
        return text_or_file
    try:
        return read_small_text(Path(text_or_file))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise LLMConfigError(
            f"backend.chat_template={text_or_file!r} is neither Jinja nor a readable file: {why}"
        ) from error


def strftime_now(pattern: str) -> str:
    """Return date and time as templates ask for them: the time that is told with the messages, on its own clock."""
    return (_time.get() or datetime.now()).replace(tzinfo=None).strftime(pattern)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

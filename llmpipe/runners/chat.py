"""Messages → prompt text, by a model's own Jinja template, in a sandbox with limits on time and size.

Gives the text that `tokenizer.apply_chat_template` of transformers
gives for the same template. Text from a dataset is only ever a value, never a template.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser

from llmpipe.exceptions import LLMConfigError
from llmpipe.records import Message
from llmpipe.runners.templates.code import MOST_SOURCE, BoundedEnvironment

MOST_REASON = 1000
"""Characters of what a template says when it refuses a chat."""


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

    def render(self, messages: Sequence[Message]) -> str:
        """Render `messages` up to where the assistant's answer begins.

        Raises:
            ChatTemplateError: the template refuses the messages, or fails on them.
        """
        try:
            return self._environment.render(
                self._template,
                {
                    "messages": list(messages),
                    "add_generation_prompt": True,
                    "tools": None,
                    "documents": None,
                    **self._special_tokens,
                },
            )
        except Exception as error:  # a template is a program of the model's: it may fail in any way
            reason = str(error)[:MOST_REASON]
            raise ChatTemplateError(f"the chat template refuses these messages: {reason}") from error


def read_template(text_or_file: str) -> str:
    """Return the template in `text_or_file`: the content of a file of that name, or the text itself.

    Raises:
        LLMConfigError: it looks like a file name, and there is no such file.
    """
    if "{" in text_or_file or "\n" in text_or_file:
        return text_or_file
    try:
        return Path(text_or_file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise LLMConfigError(f"backend.chat_template={text_or_file!r} is neither Jinja nor a readable file") from error


def strftime_now(pattern: str) -> str:
    """Return the time of day, as templates ask for it."""
    return datetime.now().strftime(pattern)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

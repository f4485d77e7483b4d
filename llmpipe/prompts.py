"""Row → request. Knows nothing of datasets or models: the chat template is applied inside the runner.

Text from a dataset is only ever a value; `prompt.template` is the user's, and may name columns, nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmpipe.cells import is_missing, lookup, without_fraction
from llmpipe.chats import (
    Chat,
    continues,
    from_arrow,
    from_json,
    kind_of,
    parse_messages,
    parse_template_kwargs,
    parse_tools,
    read_tools,
)
from llmpipe.config import ColumnsConfig, ControlTokens, Overflow, PromptConfig, SamplingConfig
from llmpipe.exceptions import LLMConfigError, UnusableText
from llmpipe.records import Message, Request, Row
from llmpipe.seeds import derive_seed
from llmpipe.sharegpt import chat_of
from llmpipe.text import is_utf8

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


class PromptBuilder:
    """Turns rows into requests.

    Args:
        prompt: The options that say how a prompt becomes a request.
        columns: The names of the columns with prompts, chats and ids.
        sampling: The run's options, which a row's own override.
        seed: The run's seed.
        chat: Whether plain prompts become user messages.

    Raises:
        LLMConfigError: the run's tools or template arguments are none.
    """

    def __init__(
        self, prompt: PromptConfig, columns: ColumnsConfig, sampling: SamplingConfig, seed: int, chat: bool
    ) -> None:
        self._prompt = prompt
        self._columns = columns
        self._sampling = sampling
        self._seed = seed
        self._chat = chat
        settled = settle_prompt(prompt)
        self._tools, self._template_kwargs = parse_tools(settled.tools), settled.chat_template_kwargs

    def build(self, row: Row, done: frozenset[int] = frozenset()) -> Request | None:
        """Return the request for a row's samples that are not `done`; None when all are.

        Raises:
            ValueError: the row cannot be run; says why.
        """
        if row.error is not None:
            raise ValueError(row.error)
        sampling = self._sampling_of(row.value(self._columns.sampling))
        samples = tuple(sample for sample in range(sampling.n) if sample not in done)
        if not samples:
            return None
        seed = sampling.seed if sampling.seed is not None else derive_seed(self._seed, row.id(self._columns.id))
        request = Request(row.index, sampling, seed=seed, samples=samples)
        request.truncate = self._prompt.overflow is Overflow.truncate
        request.literal = self._prompt.control_tokens is ControlTokens.literal
        request.add_bos = None if self._prompt.add_bos == "auto" else self._prompt.add_bos
        messages = self._plain(row, chat_of(row, self._columns)) if self._prompt.template is None else None
        if messages is not None:
            self._chat_of(row, request, parse_messages(messages))
        elif self._chat:
            self._chat_of(row, request, ({"role": "user", "content": self._text_of(row)},))
        else:
            request.prompt = self._text_of(row)
        return request

    def _chat_of(self, row: Row, request: Request, messages: tuple[Message, ...]) -> None:
        """Put a chat into its request, with what its template is told besides."""
        request.messages = Chat(self._with_system(messages))
        request.continue_final = continues(self._prompt.continue_final, messages)
        tools = self._value(row, self._columns.tools)
        request.tools = self._tools if tools is None else parse_tools(tools)
        own = parse_template_kwargs(self._value(row, self._columns.chat_template_kwargs))
        request.template_kwargs = {**self._template_kwargs, **(own or {})} or None

    def _value(self, row: Row, column: str | None) -> Any:
        """Return what a row has in a column of lists or objects; None for nothing."""
        return None if column is None else self._plain(row, row.value(column))

    @staticmethod
    def _plain(row: Row, value: Any) -> Any:
        """Return a value without what Arrow adds to lists and objects; None for nothing."""
        if is_missing(value):
            return None
        return value if row.batch is None else from_arrow(value)

    def _text_of(self, row: Row) -> str:
        """Return the plain prompt of a row that is no chat."""
        if self._prompt.template is not None:
            text: Any = fill(self._prompt.template, row.values)
        else:
            text = row.value(self._columns.prompt)
        if is_missing(text):
            raise ValueError(
                f"no prompt: {self._columns.prompt!r} and {self._columns.messages!r} are both missing or null"
            )
        if not isinstance(text, str):
            raise ValueError(f"the prompt is {kind_of(text)}, not text")
        if not text:
            raise UnusableText("the prompt is empty")
        if not is_utf8(text):
            raise UnusableText("the prompt holds a lone surrogate, which no UTF-8 text can")
        return text

    def _with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if self._prompt.system is None or messages[0]["role"] in ("system", "developer"):
            return messages
        return ({"role": "system", "content": self._prompt.system}, *messages)

    def _sampling_of(self, overrides: Any) -> SamplingConfig:
        if is_missing(overrides):
            return self._sampling
        if isinstance(overrides, str):
            overrides = from_json(overrides, "sampling")
        said = _said(overrides)
        if not isinstance(said, Mapping):
            raise ValueError(f"the row's sampling is {kind_of(overrides)}, not an object of options")
        try:
            return self._sampling.replace({name: _said(value) for name, value in said.items()})
        except (LLMConfigError, TypeError, OverflowError) as error:
            raise ValueError(f"the row's sampling: {error}") from error


def settle_prompt(prompt: PromptConfig) -> PromptConfig:
    """Return the options with a file of tools read, which is then not looked at again.

    Raises:
        LLMConfigError: the file cannot be read, or the tools or the arguments for the template are none.
    """
    try:
        kwargs = parse_template_kwargs(prompt.chat_template_kwargs)
    except ValueError as error:
        raise LLMConfigError(f"prompt.chat_template_kwargs is not allowed: {error}") from error
    return replace(prompt, tools=read_tools(prompt.tools), chat_template_kwargs=kwargs or {})


OTHER_NAMES = {
    "functions": "see dataset.columns.tools",
    "template_kwargs": "see dataset.columns.chat_template_kwargs",
    "system": "see prompt.system",
    "system_prompt": "see prompt.system",
}
"""Columns that elsewhere mean what llmpipe has other names for."""


def unread_columns(prompt: PromptConfig, columns: ColumnsConfig, found: Sequence[str], chat: bool) -> dict[str, str]:
    """Return the columns that look as if they were meant to be read, and why nothing reads them.

    Args:
        prompt: The run's options.
        columns: What it calls its columns.
        found: The columns there are.
        chat: Whether plain prompts become chats.
    """
    chats = chat or (prompt.template is None and columns.messages in found)
    reads = {"messages": prompt.template is None, "tools": chats, "chat_template_kwargs": chats}
    read = {name for key, name in vars(columns).items() if reads.get(key, True)}
    read |= set() if prompt.template is None else set(template_columns(prompt.template))
    why = dict(OTHER_NAMES)
    for key, is_read in reads.items():
        name = getattr(columns, key)
        if name is not None:
            why[key] = f"dataset.columns.{key}={name}"
            if not is_read:
                why[name] = "prompt.template= is used" if key == "messages" else "prompts go in raw"
    return {name: reason for name, reason in why.items() if name in found and name not in read}


def template_columns(template: str) -> list[str]:
    """Return the columns that a prompt template names.

    Raises:
        LLMConfigError: a brace stands alone.
    """
    rest = _FIELD.sub("", template)
    if "{" in rest or "}" in rest:
        raise LLMConfigError(
            f"prompt.template={template!r} has a brace that stands alone; write {{{{ or }}}} for the character"
        )
    return [match[1] for match in _FIELD.finditer(template) if match[1] is not None]


def fill(template: str, values: Mapping[str, Any]) -> str:
    """Put a row's values into a prompt template.

    Raises:
        ValueError: the row lacks a column that the template names.
    """

    def value_of(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        value = without_fraction(lookup(values, match[1]))
        if is_missing(value):
            raise ValueError(f"the prompt template names the column {match[1]!r}, which is missing or null")
        if isinstance(value, (dict, list, bool)):
            return json.dumps(value, ensure_ascii=False, default=str)
        return str(value)

    return _FIELD.sub(value_of, template)


def _said(value: Any) -> Any:
    """Return an object without its empty fields; a value that is not an object is returned as it is.

    A Parquet struct has every field in every row, null where the row says nothing, or NaN; a map is a list of pairs.
    """
    if isinstance(value, list) and value and all(isinstance(item, tuple) for item in value):
        value = dict(value)
    if not isinstance(value, Mapping):
        return value
    return {name: inner for name, inner in value.items() if not is_missing(inner)}

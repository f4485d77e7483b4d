"""Row → request. Knows nothing of files or models: the chat template is applied inside the runner.

Text from a dataset is only ever a value; `prompt.template` is the user's, and may name columns, nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import orjson

from llmpipe.config import ColumnsConfig, Overflow, PromptConfig, SamplingConfig
from llmpipe.exceptions import LLMConfigError
from llmpipe.records import Message, Request, Row, UnusableText, derive_seed, is_utf8, lookup
from llmpipe.sharegpt import as_messages, chat_of

ROLES = ("system", "developer", "user", "assistant", "tool")
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


class PromptBuilder:
    """Turns rows into requests.

    Args:
        prompt: What becomes of a prompt.
        columns: Where it is.
        sampling: The run's options, which a row's own override.
        seed: The run's seed.
        chat: Whether plain prompts become user messages.
    """

    def __init__(
        self, prompt: PromptConfig, columns: ColumnsConfig, sampling: SamplingConfig, seed: int, chat: bool
    ) -> None:
        self._prompt = prompt
        self._columns = columns
        self._sampling = sampling
        self._seed = seed
        self._chat = chat

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
        messages = chat_of(row, self._columns) if self._prompt.template is None else None
        if messages is not None:
            text, chat = "", self._with_system(parse_messages(messages))
        else:
            text, chat = self._text_of(row), None
            if self._chat:
                text, chat = "", self._with_system(({"role": "user", "content": text},))
        return Request(row.index, sampling, text, chat, seed, samples, self._prompt.overflow is Overflow.truncate)

    def _text_of(self, row: Row) -> str:
        """Return the plain prompt of a row that is no chat."""
        if self._prompt.template is not None:
            text: Any = fill(self._prompt.template, row.values)
        else:
            text = row.value(self._columns.prompt)
        if text is None:
            raise ValueError(
                f"no prompt: {self._columns.prompt!r} and {self._columns.messages!r} are both missing or null"
            )
        if not isinstance(text, str):
            raise ValueError(f"the prompt is {_kind(text)}, not text")
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
        if overrides is None:
            return self._sampling
        if isinstance(overrides, str):
            overrides = _json(overrides, "sampling")
        if not isinstance(overrides, Mapping):
            raise ValueError(f"the row's sampling is {_kind(overrides)}, not an object of options")
        try:  # a Parquet struct has every field in every row, null where the row says nothing
            return self._sampling.replace({name: value for name, value in overrides.items() if value is not None})
        except (LLMConfigError, TypeError, OverflowError) as error:
            raise ValueError(f"the row's sampling: {error}") from error


def parse_messages(value: Any) -> tuple[Message, ...]:
    """Check the messages of a chat; OpenAI's text parts are joined to plain text.

    Raises:
        ValueError: the value is no non-empty list of messages with a known role and text.
    """
    if isinstance(value, str):
        value = _json(value, "messages")
    value = as_messages(value)
    if not isinstance(value, list):
        raise ValueError(f"messages are {_kind(value)}, not a list")
    if not value:
        raise UnusableText("messages are an empty list")
    return tuple(_parse_message(number, message) for number, message in enumerate(value, 1))


def _parse_message(number: int, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is {_kind(message)}, not an object with role and content")
    parsed = {str(key): value for key, value in message.items() if value is not None}
    role, content = parsed.get("role"), parsed.get("content")
    if role not in ROLES:
        raise ValueError(f"message {number} has the role {role!r}; there are {', '.join(ROLES)}")
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if content is None and "tool_calls" in parsed:
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"message {number} has {_kind(content)} as content, not text")
    if not is_utf8(json.dumps(parsed, ensure_ascii=False, default=str)):
        raise UnusableText(f"message {number} holds a lone surrogate, which no UTF-8 text can")
    return {**parsed, "content": content}


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
        value = lookup(values, match[1])
        if value is None:
            raise ValueError(f"the prompt template names the column {match[1]!r}, which is missing or null")
        if isinstance(value, (dict, list, bool)):
            return json.dumps(value, ensure_ascii=False, default=str)
        return str(value)

    return _FIELD.sub(value_of, template)


def _json(text: str, what: str) -> Any:
    try:
        return orjson.loads(text)
    except ValueError as error:
        raise ValueError(f"{what} is text, and not valid JSON: {error}") from error


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text"}
    return {**names, dict: "an object", list: "a list"}.get(type(value), f"a {type(value).__name__}")

"""What people call a chat → the messages, tools and arguments that a chat template is given.

The one way in, for the rows of a dataset and for the calls of the library. Knows nothing of models or templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeGuard

import orjson

from llmpipe.cells import MAX_LEVELS, is_missing, is_too_deep
from llmpipe.config.checks import readable
from llmpipe.exceptions import LLMConfigError, UnusableText
from llmpipe.quoting import quoted
from llmpipe.records import Message
from llmpipe.sharegpt import as_messages
from llmpipe.system.small_files import read_small_text
from llmpipe.text import is_utf8

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content parts that are text, in OpenAI's two formats."""
TAKEN_NAMES = {
    "messages": "the chat itself",
    "tools": "given as tools",
    "add_generation_prompt": "decided by continue_final",
    "continue_final_message": "decided by continue_final",
    "raise_exception": "a function that templates have",
    "strftime_now": "a function that templates have",
}
"""Names that an argument for the template cannot have, because they mean something already."""


class Chat(tuple[Message, ...]):
    """Messages that have been looked at by `parse_messages`: each has a role, and plain text as its content."""

    __slots__ = ()


@dataclass(frozen=True)
class ChatInput:
    """All that a chat template is told."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    """What the model may call, in OpenAI's format."""
    template_kwargs: Mapping[str, Any] | None = None
    """Further names that the template may ask for, such as `enable_thinking`."""
    continue_final: bool = False
    """The text ends with that of the last message, which the answer continues; else where an answer begins."""
    now: datetime | None = None
    """The current time, for templates that print it."""


def parse_messages(value: Any, any_role: bool = False) -> Chat:
    """Check the messages of a chat, and make plain text of content parts and objects of arguments that are JSON text.

    Args:
        value: A list of messages in OpenAI's format, or its JSON text. A `Chat` is returned as it is.
        any_role: Leave it to the template which roles there are.

    Raises:
        ValueError: the value is no non-empty list of messages with a known role and text.
    """
    if isinstance(value, Chat):
        return value
    value = from_json(value, "messages") if isinstance(value, str) else value
    if not is_list(value):
        raise ValueError(f"messages are {kind_of(value)}, not a list")
    if not value:
        raise UnusableText("messages are an empty list")
    value = as_messages(value)
    return Chat(_message(number, message, any_role) for number, message in enumerate(value, 1))


def _message(number: int, message: Any, any_role: bool) -> Message:
    message = _object_or_as_it_is(message)
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is {kind_of(message)}, not an object with role and content")
    parsed = {str(key): value for key, value in message.items() if not is_missing(value)}
    role, content = parsed.get("role"), parsed.get("content")
    if role not in ROLES and not (any_role and isinstance(role, str)):
        raise ValueError(f"message {number} has the role {quoted(role)}; there are {', '.join(ROLES)}")
    if "tool_calls" in parsed:
        calls = parsed.pop("tool_calls")
        if calls:  # a column of lists has an empty one where there are none
            parsed["tool_calls"] = [_call(call) for call in calls] if is_list(calls) else calls
            content = "" if content is None else content
    if is_list(content):
        content = "".join(_text_of(number, part) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"message {number} has {kind_of(content)} as content, not text")
    parsed["content"] = content
    if not _is_text_throughout(parsed):
        raise UnusableText(f"message {number} holds a lone surrogate, which no UTF-8 text can")
    return parsed


def _text_of(number: int, part: Any) -> str:
    """Return the text of a content part."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f"message {number} has {kind_of(part)} as a part of its content, not an object")
    kind, text = part.get("type") or "text", part.get("text")
    if kind not in TEXT_PARTS:
        raise ValueError(f"message {number} has a content part of type {quoted(kind)}, and only text can be run")
    if not isinstance(text, str):
        raise ValueError(f"message {number} has a content part of type {quoted(kind)} with {kind_of(text)} as its text")
    return text


def _call(call: Any) -> Any:
    """Return a tool call with arguments that are an object, where they are an object's JSON text."""
    call = _object_or_as_it_is(call)
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "arguments" not in function:
        return call
    return {**call, "function": {**function, "arguments": _object_or_as_it_is(function["arguments"])}}


def _object_or_as_it_is(value: Any) -> Any:
    """Return the object that a JSON text holds; anything else, text of other kinds included, as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        held = json.loads(value)  # not by orjson, which rounds what exceeds 64 bits
    except (ValueError, RecursionError):
        return value
    return value if is_too_deep(held, value) else held


def parse_tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    """Check what a model may call.

    Args:
        value: A list of tools in OpenAI's format, or its JSON text; None, or an empty list, for no tools.

    Raises:
        ValueError: the value is no list of objects.
    """
    value = from_json(value, "tools") if isinstance(value, str) else value
    if value is None:
        return None
    if not is_list(value):
        raise ValueError(f"tools are {kind_of(value)}, not a list of objects")
    tools = [_object_or_as_it_is(tool) for tool in value]
    for number, tool in enumerate(tools, 1):
        if not isinstance(tool, Mapping):
            raise ValueError(f"tool {number} is {kind_of(tool)}, not an object in OpenAI's format")
    if not _is_text_throughout(tools):
        raise ValueError("tools hold a lone surrogate, which no UTF-8 text can")
    return tuple(dict(tool) for tool in tools) or None


def read_tools(given: Any) -> list[dict[str, Any]] | None:
    """Return the tools that a run is given.

    Args:
        given: A list of tools, its JSON text, or the name of a file that holds it.

    Raises:
        LLMConfigError: the file cannot be read, or there are no tools in it.
    """
    text, what = given, "prompt.tools"
    try:
        if isinstance(given, (str, Path)) and not str(given).lstrip().startswith(("[", "{")):
            what = f"prompt.tools={str(given)!r}"
            with readable("prompt.tools", str(given)):
                text = read_small_text(Path(given).expanduser(), encoding="utf-8-sig")
        tools = parse_tools(text)
    except LLMConfigError:
        raise
    except ValueError as error:
        raise LLMConfigError(f"{what} is not allowed: {error}") from error
    return None if tools is None else list(tools)


def parse_template_kwargs(value: Any) -> dict[str, Any] | None:
    """Check the further arguments of a chat template.

    Args:
        value: An object, or its JSON text; names that are null count as not given.

    Raises:
        ValueError: the value is no object, or one of its names means something already.
    """
    value = from_json(value, "chat_template_kwargs") if isinstance(value, str) else value
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"chat_template_kwargs are {kind_of(value)}, not an object")
    given = {str(name): argument for name, argument in value.items() if argument is not None}
    for name in given:
        if name in TAKEN_NAMES:
            raise ValueError(f"chat_template_kwargs cannot have the name {name!r}, which is {TAKEN_NAMES[name]}")
    if not _is_text_throughout(given):
        raise ValueError("chat_template_kwargs hold a lone surrogate, which no UTF-8 text can")
    return given or None


def continues(how: bool | str, messages: Any) -> bool:
    """Say whether the answer continues the last message.

    Args:
        how: True, False, or `auto`: whether the last message is the assistant's, and does not call tools.
        messages: The chat, looked at or not.
    """
    if how != "auto":
        return bool(how)
    last = messages[-1] if messages else None
    return isinstance(last, Mapping) and last.get("role") == "assistant" and not last.get("tool_calls")


def from_arrow(value: Any) -> Any:
    """Return a value of an Arrow column as JSON would have it.

    Its objects have null for each name that they lack and others have, which is left out, or they are lists of pairs.
    """
    if isinstance(value, list) and value and all(isinstance(item, tuple) for item in value):
        value = dict(value)
    if isinstance(value, dict):
        return {name: from_arrow(inner) for name, inner in value.items() if inner is not None}
    return [from_arrow(inner) for inner in value] if isinstance(value, list) else value


def from_json(text: str, what: str) -> Any:
    """Return what a JSON text holds.

    Raises:
        ValueError: the text is not JSON; the message says `what` it should be.
    """
    try:
        value = orjson.loads(text)
    except ValueError as error:
        try:
            value = json.loads(text)  # which reads NaN, as data frames write it
        except (ValueError, RecursionError):
            raise ValueError(f"{what} is text, and not valid JSON: {error}") from error
    if is_too_deep(value, text):
        raise ValueError(f"{what} nests more than {MAX_LEVELS} levels deep")
    return value


def kind_of(value: Any) -> str:
    """Return what a value is, in the words of JSON."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text"}
    return {**names, dict: "an object", list: "a list"}.get(type(value), f"a {type(value).__name__}")


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Say whether a value is a list, or what Python has in the place of one."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_text_throughout(value: Any) -> bool:
    """Say whether UTF-8 can hold all text in a value.

    Raises:
        ValueError: nobody can walk the value.
    """
    try:
        return is_utf8(json.dumps(value, ensure_ascii=False, default=str))
    except RecursionError as error:
        raise ValueError("the chat is nested too deeply") from error

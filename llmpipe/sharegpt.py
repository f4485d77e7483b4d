"""Where a row's chat is, and chats as ShareGPT has them: lists of {from, value} → messages with role and content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmpipe.config import ColumnsConfig
from llmpipe.records import Row

CONVERSATIONS = "conversations"
"""The column of chats; it is read where a row has neither a prompt nor messages."""
_ROLES = {
    "human": "user",
    **dict.fromkeys(["gpt", "chatgpt", "bard", "bing", "model", "function_call"], "assistant"),
    **dict.fromkeys(["observation", "function_response"], "tool"),
}


def chat_of(row: Row, columns: ColumnsConfig) -> Any:
    """Return the chat of a row as it stands there, or None."""
    messages = row.value(columns.messages)
    if messages is None and row.value(columns.prompt) is None:
        return row.values.get(CONVERSATIONS)
    return messages


def as_messages(value: Any) -> Any:
    """Return a chat with `role` and `content` in place of `from` and `value`; anything else comes back as it is."""
    return [_as_message(turn) for turn in value] if isinstance(value, (list, tuple)) else value


def _as_message(turn: Any) -> Any:
    if not isinstance(turn, Mapping) or "from" not in turn or turn.get("role") is not None:
        return turn
    rest = {name: value for name, value in turn.items() if name not in ("from", "value", "role", "content")}
    return {"role": _ROLES.get(turn["from"], turn["from"]), "content": turn.get("value"), **rest}

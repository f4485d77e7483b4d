"""A chat → the form that one model's template can take, with each change to the chat mentioned once.

The template itself, and how it is kept in bounds, are chat.py.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace

from llmpipe.chats import ChatInput
from llmpipe.records import Message
from llmpipe.runners.chat import ChatTemplate, ChatTemplateError

log = logging.getLogger(__name__)

_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)
_PLAIN = re.compile(r"[A-Za-z0-9 ]+")


class ChatRenderer:
    """Renders the chats of one model."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self.silent = False
        """Say nothing: whoever renders the same chats afterwards will."""

    def render(self, template: ChatTemplate, chat: ChatInput) -> str:
        """Return the prompt text of a chat; a developer's messages are the system's where only that is known.

        Raises:
            ChatTemplateError: the template refuses the messages, or the last one cannot be continued.
        """
        messages = chat.messages
        if chat.continue_final and (messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls")):
            raise ChatTemplateError(
                f"the last message is not the beginning of an answer: its role is {messages[-1]['role']!r}"
                f"{', and it calls tools' if messages[-1].get('tool_calls') else ''}; use prompt.continue_final=auto"
            )
        if "developer" not in template.source and any(message["role"] == "developer" for message in messages):
            chat = replace(
                chat, messages=[{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
            )
            self._say("the chat template knows no developer: messages of that role are given to it as the system's")
        if chat.tools and "tools" not in template.source:
            self._say("the chat template knows no tools: the model is not told of those that are given")
        return template.render(chat)

    def look_for_dropped(self, chat: Sequence[Message], text: str, row: int) -> None:
        """Say so where a message is nowhere in the rendered text; only the first is reported."""
        if self.silent or "dropped" in self._said:
            return
        for message in chat:
            if not _is_in(message["content"], text):
                self._said.add("dropped")
                log.warning(
                    "the chat template leaves out a message of the role %r, first in row-%d; "
                    "further ones are not reported",
                    message["role"],
                    row,
                )
                return

    def _say(self, what: str) -> None:
        if not self.silent and what not in self._said:
            self._said.add(what)
            log.warning("%s", what)


def _is_in(content: str, text: str) -> bool:
    """Say whether a message is in a rendered chat, also where the template trims or escapes it, or leaves out thoughts.

    What counts, where it is not there word for word, is the longest run of characters that nothing would escape.
    """
    content = content.strip()
    if content in text:
        return True
    content = _THOUGHTS.sub("", content).rpartition("</think>")[2].strip()
    run = max((run.strip() for run in _PLAIN.findall(content)), key=len, default="")
    return (run or json.dumps(content)[1:-1]) in text

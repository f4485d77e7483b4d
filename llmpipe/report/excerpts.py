"""What is kept of a row and its answer: the beginning of each text, and nothing that keeps the row itself alive."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from llmpipe.cells import is_missing
from llmpipe.config import ColumnsConfig
from llmpipe.records import Completion, Row
from llmpipe.redaction import redacted
from llmpipe.sharegpt import as_messages, chat_of
from llmpipe.text import harmless

CHARACTERS = 2000
"""What is kept of each text."""
TURNS = 8
"""What is kept of a chat: its last turns, which the answer answers."""
PLAIN = "\t\u00a0\u3000\u200c\u200d"
"""Not printable to Python, but harmless in a browser, and texts need them: tabs, the spaces of French and Japanese, the
joiners of Persian, Hindi and emoji."""


def shown(text: str) -> str:
    r"""Return text as the page has it: what a browser would obey, drop or hide is spelt out, such as `\u202e`."""
    if text.isprintable():
        return text
    return "".join(c if c in PLAIN else harmless(c) for c in text)


class Text(NamedTuple):
    """A text, or its beginning."""

    text: str
    characters: int
    """Length of the whole text."""


class Failed(NamedTuple):
    """What is shown of a row without an answer."""

    place: str
    id: Text
    reason: Text


class Answer(NamedTuple):
    """What is shown of a row and its answer."""

    place: str
    id: Text
    asked: list[tuple[Text, Text]]
    """What the model was asked, each with its role; of templated prompts, the row that they were made of."""
    turns_before: int
    """How many earlier turns of the chat are left out."""
    text: Text
    reference: Text | None
    scores: dict[str, float]
    finish_reason: str | None
    tokens: int | None
    latency_s: float | None


def failed_of(row: Row, completion: Completion, columns: ColumnsConfig) -> Failed:
    """Return what is shown of a row without an answer."""
    return Failed(_place(row, completion), cut(row.id(columns.id)), cut(completion.error))


def answer_of(row: Row, completion: Completion, columns: ColumnsConfig, templated: bool) -> Answer:
    """Return what is shown of a row and its answer."""
    turns = [] if templated else _turns(chat_of(row, columns))
    prompt, reference = row.value(columns.prompt), row.value(columns.reference)
    if turns:
        asked = [(cut(turn.get("role")), cut(_content(turn))) for turn in turns[-TURNS:]]
    elif prompt is not None and not templated:
        asked = [(cut("prompt"), cut(prompt))]
    else:
        asked = [(cut("row"), cut({name: row.values[name] for name in row.values if name != columns.reference}))]
    return Answer(
        place=_place(row, completion),
        id=cut(row.id(columns.id)),
        asked=asked,
        turns_before=max(0, len(turns) - TURNS),
        text=cut(completion.text or ""),
        reference=None if is_missing(reference) else cut(reference),
        scores=dict(completion.scores),
        finish_reason=completion.finish_reason,
        tokens=completion.completion_tokens,
        latency_s=completion.latency_s,
    )


def cut(value: Any) -> Text:
    """Return the beginning of a value as text."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (dict, list)) else str(value)
    except (ValueError, RecursionError):
        text = "(a value that cannot be shown)"
    return Text(text[:CHARACTERS], len(text))


def _place(row: Row, completion: Completion) -> str:
    sample = f", sample {completion.sample}" if completion.sample else ""
    return f"{redacted(row.file)} line {row.line}{sample}"


def _turns(messages: Any) -> list[dict[str, Any]]:
    if isinstance(messages, str):  # as CSV has them
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            return []
    messages = as_messages(messages)
    return [turn for turn in messages if isinstance(turn, dict)] if isinstance(messages, list) else []


def _content(turn: dict[str, Any]) -> Any:
    content = turn.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    # A turn without text calls tools; then all of it but the role is what it says.
    return content or {name: value for name, value in turn.items() if name != "role" and value}

"""Tokens → text as they come, for any tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 6
"""Prompt tokens decoded along with the first new ones, so that leading spaces come out right."""
UNFINISHED = 3
"""Most tokens that an unfinished character can have: it lacks at least one of its four bytes."""
MOST_GARBAGE = 16
"""Tokens of no character that are kept."""


class Detokenizer:
    """Decodes one token at a time; gives out only what later tokens can no longer change.

    A tokenizer's `decode` may look at neighbouring tokens (spaces, multi-byte characters), so each new token is decoded
    together with the ones before it, and what was already there is taken off. Bytes that can belong to no character
    become U+FFFD; an unfinished character at the end is dropped. Only the last few tokens are kept, whatever they are,
    so that a token takes no more time in a long answer than in a short one.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._silent: set[int] = set()
        """Tokens that are known to have no text wherever they stand, such as end tokens."""
        self._ids = list(prompt[-CONTEXT:])
        while "\ufffd" in self._decode():  # begins inside a character, which could spoil all bytes after it
            del self._ids[0]
        self._settled = len(self._ids)
        """How many of the ids have become text that stays."""
        self._text = self._decode()
        """The ids' text."""
        self._given = len(self._text)
        """How many characters of it are the prompt's or were given out."""

    def push(self, token: int) -> str:
        """Return the characters that `token` completes."""
        if token in self._silent:
            return ""
        before = self._text
        self._ids.append(token)
        self._text = text = self._decode()
        if text == before and not self._decode([token, token]):  # one alone may be a space, dropped as the first
            self._silent.add(token)
            self._ids.pop()
            return ""
        whole = self._whole(text)
        new = whole[self._given :]
        self._given = max(self._given, len(whole))
        if new and whole == text:
            # Forget what was settled before, keep what has just been: the next token may still lean on it.
            self._keep(self._ids[self._settled :])
            self._settled = len(self._ids)
            self._given = len(self._text)
        elif len(self._ids) - self._settled > MOST_GARBAGE:
            # Of bytes that are no text, only the first and last tokens decide how the next ones decode.
            held = len(text) - self._given
            self._keep(self._ids[: self._settled + UNFINISHED + 1] + self._ids[-UNFINISHED - 1 :])
            self._given = len(self._text) - held
        return new

    def _keep(self, ids: list[int]) -> None:
        self._ids, self._text = ids, self._decode(ids)

    def _whole(self, text: str) -> str:
        """Return `text` without the unfinished character at its end, which decodes to one U+FFFD or more."""
        if not text.endswith("\ufffd"):
            return text
        is_garbage = len(self._ids) - self._settled > UNFINISHED
        return text[:-1] if is_garbage else text.rstrip("\ufffd")

    def _decode(self, ids: Sequence[int] | None = None) -> str:
        ids = self._ids if ids is None else ids
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

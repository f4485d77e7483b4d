"""Tokens → text as they come, for any tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 6
"""Prompt tokens decoded along with the first new ones, so that leading spaces come out right."""


class TokenText:
    """Decodes one token at a time; gives out only what later tokens can no longer change.

    A tokenizer's `decode` may look at neighbouring tokens (spaces, multi-byte characters), so each new token is decoded
    together with the ones before it, and what was already there is taken off.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-CONTEXT:])
        self._start = 0
        self._given = len(self._ids)

    def push(self, token: int) -> str:
        """Return the characters that `token` completes."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._given])
        text = self._decode(self._ids[self._start :])
        if len(text) <= len(before) or text.endswith("\ufffd"):
            return ""  # a special token, or an unfinished character
        self._start, self._given = self._given, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

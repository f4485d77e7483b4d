"""Control tokens by their texts, and how those of a chat template are told from those that somebody's words spell.

In a rendered chat nobody can tell the two apart. So before the chat is rendered, a mark goes into each control token
that its words spell: a code point that is no character, and breaks the token. What is still a control token afterwards
is the template's own. Knows no backend.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Unicode keeps them for the use inside of programs."""


class Piece(NamedTuple):
    """A stretch of a prompt: as it goes to the tokenizer, or with marks, in which control tokens are text."""

    text: str
    marked: bool


class ControlTexts:
    """The control tokens of a model.

    Args:
        ids: The tokens, by their texts.
        left: Texts of the tokens that strip the white space on their left.
        right: Texts of the tokens that strip the white space on their right.
    """

    def __init__(self, ids: Mapping[str, int], left: Collection[str] = (), right: Collection[str] = ()) -> None:
        self.ids = {text: token for text, token in ids.items() if text}
        self._left, self._right = frozenset(left), frozenset(right)
        self._starts = sorted({text[:2] for text in self.ids})
        self._firsts = tuple({text[0] for text in self.ids})

    def spelt_in(self, value: Any) -> bool:
        """Say whether a text in a value spells a control token, or begins one at its end."""
        return any(self._has(text) for text in _texts(value))

    def marked(self, value: Any, mark: str) -> Any:
        """Return a value in whose texts every control token has a mark after its first character.

        Raises:
            RecursionError: the value is nested too deeply.
        """
        if isinstance(value, str):
            return self._spelt.sub(rf"\g<0>{mark}", value) if self._has(value) else value
        if isinstance(value, Mapping):
            return {self.marked(name, mark): self.marked(inner, mark) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([self.marked(inner, mark) for inner in value])
        return value

    def pieces(self, text: str, mark: str) -> Iterator[Piece]:
        """Split a rendered chat: what is between two control tokens, and has marks, stands by itself."""
        start = 0
        """Where the next piece without marks begins."""
        words = 0
        """Where the text after the last control token begins."""
        strips = False
        own = re.compile(rf"(?:{self._any})(?!{mark}|{re.escape(_escaped(mark))})")
        for token in [*own.finditer(text), None]:
            end = token.start() if token else len(text)
            between = text[words:end]
            if unmarked(between, mark) != between:
                yield from [Piece(text[start:words], False)] if start < words else []
                between = between.lstrip() if strips else between
                yield Piece(between.rstrip() if token and token[0] in self._left else between, True)
                start = end
            if token:
                words, strips = token.end(), token[0] in self._right
        if start < len(text):
            yield Piece(text[start:], False)

    def _has(self, text: str) -> bool:
        # Nearly every text ends at what takes no pattern.
        may = text.endswith(self._firsts) or any(start in text for start in self._starts)
        return may and self._spelt.search(text) is not None

    @cached_property
    def _spelt(self) -> re.Pattern[str]:
        """The first characters of control tokens, and of endings that the next text may complete to one."""
        begun = {text[:size] for text in self.ids for size in range(1, len(text))}
        return re.compile(rf"(?={self._any}|(?:{_any_of(begun)})\Z)(?s:.)")

    @cached_property
    def _any(self) -> str:
        return _any_of(self.ids)


def mark_for(*texts: Any) -> str:
    """Return a mark that occurs in none of the texts, wherever in a value they are.

    Raises:
        ValueError: all of them do.
    """
    there = "".join(_texts(texts)).lower()
    for mark in MARKS:
        if mark not in there and _escaped(mark) not in there:
            return mark
    raise ValueError("the chat holds all of U+FDD0 to U+FDEF, which are no characters")


def unmarked(text: str, mark: str) -> str:
    """Return a text without marks, as they are and as JSON escapes them."""
    return text.replace(mark, "").replace(_escaped(mark), "")


def _escaped(mark: str) -> str:
    return rf"\u{ord(mark):x}"


def _any_of(texts: Collection[str]) -> str:
    """Return a pattern that matches the longest of some texts; without texts, one that never matches."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a value, also where it is nested more deeply than Python could follow."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            waiting += [*value, *value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += value

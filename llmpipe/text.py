"""Texts from outside, before they go where not every character may: into UTF-8, or onto a terminal."""

from __future__ import annotations


def is_utf8(text: str) -> bool:
    """Say whether UTF-8 can hold the text; it cannot hold half of a surrogate pair, which JSON can smuggle in."""
    if text.isascii():  # as Python knows at once
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def harmless(text: str) -> str:
    r"""Return text in which what a terminal would obey, or not show, is spelt out, such as `\x1b`."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)

"""Names and values of the user's in messages: however many or long they are, a message stays one that can be read."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable

MOST_NAMES = 20
MOST_CHARACTERS = 200


class Names:
    """Names in the order in which they come; only the first ones are kept, the others are counted."""

    def __init__(self, names: Iterable[object] = ()) -> None:
        self._first: list[str] = []
        self._more = 0
        for name in names:
            self.add(name)

    def add(self, name: object) -> None:
        """Take the next name."""
        if len(self._first) < MOST_NAMES:
            self._first.append(shortened(str(name)))
        else:
            self._more += 1

    def __str__(self) -> str:
        return ", ".join(self._first) + (f" and {self._more:,} more" if self._more else "")


def listed(names: Iterable[object]) -> str:
    """Return names with commas between them; of many, the first ones and how many more there are."""
    return str(Names(names))


def how_to_resume(directory: object, *settings: str) -> str:
    """Return the command that goes on with the run in a directory, so that it can be pasted into a shell.

    Args:
        directory: The run directory, whatever it is called.
        settings: What is to be given besides.
    """
    name = str(directory)
    return shell_command("resume", f"./{name}" if name.startswith("-") else name, *settings)


def shell_command(*words: str) -> str:
    """Return an llmpipe command in one line, as a shell reads it."""
    return " ".join(["llmpipe", *map(for_shell, words)])


def for_shell(word: str) -> str:
    """Return a word in the quotes that a shell needs, in one line."""
    if word.isprintable():
        in_double_quotes = '"' + re.sub(r'(["\\])', r"\\\1", word) + '"'
        return in_double_quotes if "'" in word and not set("$`!") & set(word) else shlex.quote(word)
    # Line breaks, and bytes that are no UTF-8; bash, zsh and POSIX of 2024 know this kind of quotes.
    spelt_out = (chr(b) if 32 <= b < 127 and b not in b"\\'" else f"\\{b:03o}" for b in os.fsencode(word))
    return f"$'{''.join(spelt_out)}'"


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that come more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def quoted(value: object) -> str:
    """Return a value as Python writes it; of a long one, both ends."""
    return shortened(repr(value))


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """Return text; of a long one, both ends, and how much was left out."""
    if len(text) <= most:
        return text
    begin, end = most * 3 // 4, most // 4
    return f"{text[:begin]}[… {len(text) - begin - end:,} characters …]{text[-end:]}"

"""Names and values of the user's in messages: however many or long they are, a message stays one that can be read."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

MOST_NAMES = 20
MOST_CHARACTERS = 200


def listed(names: Iterable[object], most: int = MOST_NAMES) -> str:
    """Return names with commas between them; of many, the first ones and how many more there are."""
    left = iter(names)
    first = [shortened(str(name)) for name in islice(left, most)]
    more = sum(1 for _ in left)
    return ", ".join(first) + (f" and {more:,} more" if more else "")


def quoted(value: object) -> str:
    """Return a value as Python writes it; of a long one, both ends."""
    return shortened(repr(value))


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """Return text; of a long one, both ends, and how much was left out."""
    if len(text) <= most:
        return text
    begin, end = most * 3 // 4, most // 4
    return f"{text[:begin]}[… {len(text) - begin - end:,} characters …]{text[-end:]}"

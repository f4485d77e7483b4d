"""From the pieces of text a model makes to the chunks a caller may see: whole characters, cut exactly at stop strings.

Knows nothing of tokenizers or models; every runner that generates token by token sends its text through here.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Utf8Stream:
    """Joins the bytes of successive tokens to text and never cuts a character.

    Bytes that can belong to no character become U+FFFD; an unfinished character at the end is dropped.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, piece: bytes) -> str:
        """Return the characters that `piece` completes."""
        return self._decoder.decode(piece)


class StopStrings:
    """Watches text for stop strings, also across the pieces it arrives in.

    Args:
        stops: The strings; the one that is complete first ends the text, the longest where several are at once.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Return what may be shown: everything but what could still become a stop string.

        Sets `stopped` when a stop string is complete; it and what follows are cut off.
        """
        if not self._stops or not text:
            return text
        text = self._held + text
        # Each piece is searched for the stop that is complete first, as if characters came one by one.
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self._held = ""
            first_end = min(ends)[0]
            return text[: min(at for end, at in ends if end == first_end)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Return what was held back; call it once the model has ended by itself."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` with which `stop` begins, short of all of it."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0

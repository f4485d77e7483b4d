"""From the pieces of text a model makes to the chunks a caller may see: whole characters, cut exactly at stop strings.

Knows nothing of tokenizers or models; every runner that generates token by token sends its text through here.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Sequence
from typing import Any

from llmpipe.records import Chunk, Request, error_chunk


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


OPTIONS = frozenset({"max_tokens", "stop", "stop_token_ids", "ignore_eos", "n", "seed"})
"""Sampling options that an `Answer` honours, and those of which its request has made samples and their seeds."""


class Answer:
    """The answer to one sample as it grows, and the rules by which it ends.

    Args:
        request: What asked for it.
        sample: Which of the request's samples it is.
        prompt_tokens: Tokens of the prompt.
        truncated: Tokens the prompt lost on the left.
        context: Most tokens of prompt and completion.
    """

    def __init__(self, request: Request, sample: int, prompt_tokens: int, truncated: int, context: int) -> None:
        self.request = request
        self.sample = sample
        self.generated = 0
        self.finished = False
        self._room = min(request.sampling.max_tokens, context - prompt_tokens)
        self._stops = StopStrings(request.sampling.stop)
        self._facts: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "truncated_prompt_tokens": truncated,
            "cached_prompt_tokens": 0,
            "started_at": time.perf_counter(),
        }

    def cached(self, tokens: int) -> None:
        """Note how many of the prompt's tokens were copied rather than computed."""
        self._facts["cached_prompt_tokens"] = tokens

    def add(self, text: str) -> Chunk | None:
        """Count a token, and add the text it completes; return a chunk where there is something to tell."""
        self.generated += 1
        text = self._stops.push(text)
        if self._stops.stopped:
            return self._finish(text, "stop")
        if self.generated >= self._room:
            return self._finish(text + self._stops.flush(), "length")
        return Chunk(self.request.id, self.sample, text) if text else None

    def ends_at(self, token: int, is_end: bool) -> bool:
        """Say whether `token` ends the answer: one that was asked for, or one that ends any of the model's."""
        sampling = self.request.sampling
        return token in sampling.stop_token_ids or (is_end and not sampling.ignore_eos)

    def end(self) -> Chunk:
        """Return the last chunk: the model has ended by itself, or a token ended it."""
        return self._finish(self._stops.flush(), "stop")

    def fail(self, reason: str) -> Chunk:
        """Return the last chunk: the answer cannot be finished."""
        self.finished = True
        return error_chunk(self.request.id, reason, self.sample)

    def _finish(self, text: str, reason: str) -> Chunk:
        self.finished = True
        return Chunk(self.request.id, self.sample, text, reason, completion_tokens=self.generated, **self._facts)

"""A sample in flight: its tokens, how many of them a slot's cache has, its text, and the rules by which it ends."""

from __future__ import annotations

import time

from llmpipe.records import Chunk
from llmpipe.runners.batching.executor import Detokenizer, Sampler
from llmpipe.runners.batching.lookahead import Sample
from llmpipe.runners.decoding import StopStrings

OPTIONS = frozenset({"max_tokens", "stop", "stop_token_ids", "ignore_eos", "n", "seed"})
"""Sampling options that a `Sequence` honours; `n` and `seed` have made its request's samples and their seeds."""


class Sequence:
    """One sample from its admission to its last token.

    Args:
        sample: What it answers.
        sampler: Chooses its tokens.
        detokenizer: Turns them into text.
        limit: Most tokens of prompt and completion.
    """

    def __init__(self, sample: Sample, sampler: Sampler, detokenizer: Detokenizer, limit: int) -> None:
        self.sample = sample
        self.sampler = sampler
        self.tokens = list(sample.prompt)
        """The tokens of the prompt, and all that were generated."""
        self.slot = -1
        """The slot that holds its cache; -1 while it has none."""
        self.cached = 0
        """How many of its tokens are in the cache. The others are computed next; then comes a new one."""
        self.copied = 0
        """How many of the prompt's tokens came from a shared prefix at no cost."""
        self.finished = False
        self._detokenizer = detokenizer
        self._room = min(sample.request.sampling.max_tokens, limit - len(sample.prompt))
        self._stops = StopStrings(sample.request.sampling.stop)
        self._started_at = time.perf_counter()

    def add(self, token: int, is_end: bool) -> Chunk | None:
        """Take the next token; return a chunk where there is something to tell.

        Args:
            token: What was chosen.
            is_end: Whether it ends any answer of the model.
        """
        sampling = self.sample.request.sampling
        if token in sampling.stop_token_ids or (is_end and not sampling.ignore_eos):
            return self._finish(self._stops.flush(), "stop")
        self.tokens.append(token)
        text = self._stops.push(self._detokenizer.push(token))
        if self._stops.stopped:
            return self._finish(text, "stop")
        if self._generated >= self._room:
            return self._finish(text + self._stops.flush(), "length")
        return Chunk(self.sample.request.id, self.sample.number, text) if text else None

    def fail(self, reason: str) -> Chunk:
        """Return the last chunk: the answer cannot be finished."""
        self.finished = True
        return self.sample.error_chunk(reason)

    @property
    def _generated(self) -> int:
        return len(self.tokens) - len(self.sample.prompt)

    def _finish(self, text: str, reason: str) -> Chunk:
        self.finished = True
        return Chunk(
            self.sample.request.id,
            self.sample.number,
            text,
            reason,
            prompt_tokens=len(self.sample.prompt),
            cached_prompt_tokens=self.copied,
            truncated_prompt_tokens=self.sample.truncated,
            completion_tokens=self._generated,
            started_at=self._started_at,
        )

"""Prefill and decode apart: the tokens that an engine computed, and the time of its own that they took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Throughput:
    """What was computed since the stream began.

    Time is that of the forward pass and of choosing tokens from its logits; what happens between the steps, such as
    whatever is done with the chunks, is not in it. A device that computes asynchronously is waited for only where
    tokens are chosen, so a step that chooses none (a long prompt's first pieces) may be counted in the next one's time.
    """

    prefill_s: float = 0.0
    """Seconds in steps that compute prompts, and rows once more after memory ran out."""
    decode_s: float = 0.0
    """Seconds in steps that compute one token for each row in flight."""
    prefill_tokens: int = 0
    """Tokens computed in the former: a shared prefix counts once, and its copies do not."""
    decode_tokens: int = 0
    """Tokens computed in the latter: the generated ones, but for each row's first, which ends its prefill."""

    @contextmanager
    def step(self, tokens: int, is_prefill: bool) -> Iterator[None]:
        """Count a step of `tokens` tokens, and the time until it has been computed."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        if is_prefill:
            self.prefill_s += seconds
            self.prefill_tokens += tokens
        else:
            self.decode_s += seconds
            self.decode_tokens += tokens

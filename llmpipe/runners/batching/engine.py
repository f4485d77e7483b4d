"""Continuous batching: rows share the model's calls, and a finished row's slot goes to the next one at once.

A step is one call of the model: the scheduler decides what it computes, the backend's context computes it and samples
the next token of each row that is computed so far, and the scheduler takes those. Knows nothing of any backend.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from llmpipe.config import BatchingConfig
from llmpipe.exceptions import LLMOutOfMemoryError
from llmpipe.records import Chunk, Request
from llmpipe.runners.batching.executor import Executor
from llmpipe.runners.batching.lookahead import Encode, LookAhead
from llmpipe.runners.batching.scheduler import Scheduler
from llmpipe.runners.batching.throughput import Throughput
from llmpipe.stopwatch import Tick, no_tick


class Engine:
    """Runs samples through an executor.

    Args:
        executor: The loaded model.
        config: Sizes, and whether answers may depend on the batch.
        limit: Most tokens of prompt and completion per row.

    Raises:
        LLMInitializationError: the backend cannot make a context of the least size.
    """

    def __init__(self, executor: Executor, config: BatchingConfig, limit: int) -> None:
        self.executor = executor
        self.limit = limit
        self.throughput = Throughput()
        self.scheduler = Scheduler(executor, config, limit)
        # Sharing a prefix computes a prompt in other pieces, whose sums may round otherwise.
        self._share = not config.reproducible and not executor.is_static

    def stream(self, requests: Iterable[Request | None], encode: Encode, tick: Tick = no_tick) -> Iterator[Chunk]:
        """Answer `requests`, with a `tick` before each step; see `BaseLLMRunner.stream`."""
        self.throughput = Throughput()
        self.scheduler.begin(LookAhead(requests, encode, self.limit, self._share))
        try:
            while not self.scheduler.is_done:
                tick()
                yield from self.step()  # whoever gets the chunks may do as he likes meanwhile
        finally:
            self.scheduler.end()

    def step(self) -> list[Chunk]:
        """Schedule a call of the model, compute it, sample from its logits; return what the rows have to tell then."""
        scheduler = self.scheduler
        try:
            step = scheduler.schedule()
            if step is not None:
                with self.throughput.step(step.tokens, step.is_prefill):
                    scheduler.context.compute()
                    tokens = scheduler.context.sample([sequence.sampler for sequence in step.outputs])
                scheduler.advance(step, tokens)
        except LLMOutOfMemoryError as error:
            scheduler.shrink(str(error))
        return scheduler.take_chunks()

    def cancel(self, request_id: int) -> None:
        """Give up a request of the running stream; it ends with an error chunk, and its slots are free at once."""
        self.scheduler.cancelled.add(request_id)

    def close(self) -> None:
        """Free the context."""
        self.scheduler.close()

    def info(self) -> dict[str, Any]:
        """Say which sizes there are and why, how many rows were in flight, and what was computed in which time."""
        scheduler, sizes = self.scheduler, self.scheduler.sizes
        return {
            "context": self.limit,
            "slots": sizes.slots,
            "slot_tokens": sizes.context,
            "prefix_slots": sizes.prefixes,
            "sizes": list(sizes.reasons),
            "most_rows_in_flight": scheduler.most_rows_in_flight,
            "shrinks": scheduler.shrinks,
            "context_s": scheduler.context_s,
            "engine": asdict(self.throughput),
        }

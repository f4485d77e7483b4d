"""The chunks of a stream → completions, timed from outside: when a row was pulled, began and ended.

Knows nothing of models; whoever drives a stream may end it at any step, by a `Tick` that raises.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator

from llmpipe.exceptions import LLMInferenceError, presentable
from llmpipe.records import Chunk, Completion, Request, failed

_NOT_WAITING: tuple[float, set[int]] = 0.0, set()
StreamFn = Callable[[Iterable[Request]], Iterator[Chunk]]
Tick = Callable[[], None]
"""Called at each step of a stream; what it raises ends the stream."""


def no_tick() -> None:
    """Go on, whatever happens."""


class Stopwatch:
    """Turns the chunks of a stream into completions, timing from outside what a runner cannot be trusted to time."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[float, set[int]]] = {}
        """When each request was pulled, and which of its samples have no answer yet."""
        self._open: dict[tuple[int, int], tuple[Completion, list[str]]] = {}
        self.waiting = 0
        """Samples that were pulled and have no answer yet."""

    def watch(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Pass `requests` on, noting when each one is pulled."""
        for request in requests:
            self._waiting[request.id] = time.perf_counter(), set(request.samples)
            self.waiting += len(request.samples)
            yield request

    def add(self, chunk: Chunk) -> Completion | None:
        """Take one chunk; return the completion when it was the last of its sample.

        Raises:
            LLMInferenceError: the chunk answers what was not asked, or has been answered.
        """
        now = time.perf_counter()
        key = (chunk.request_id, chunk.sample)
        pulled_at, waiting = self._waiting.get(chunk.request_id, _NOT_WAITING)
        if chunk.sample not in waiting:
            raise LLMInferenceError(
                f"the runner answered request {key[0]}, sample {key[1]}, which is not waiting for one"
            )
        begun = self._open.pop(key, None)
        completion, texts = begun or (Completion(*key), [])
        if chunk.restarts:
            texts.clear()
            completion.first_token_s = None
        if chunk.text:
            texts.append(chunk.text)
        if completion.first_token_s is None and (chunk.text or chunk.finish_reason):
            completion.first_token_s = now - pulled_at
        if chunk.finish_reason is None:
            self._open[key] = completion, texts
            return None
        waiting.discard(chunk.sample)
        self.waiting -= 1
        if not waiting:
            del self._waiting[chunk.request_id]
        completion.finish_reason = chunk.finish_reason
        completion.latency_s = now - pulled_at
        completion.prompt_tokens = chunk.prompt_tokens
        completion.cached_prompt_tokens = chunk.cached_prompt_tokens
        completion.truncated_prompt_tokens = chunk.truncated_prompt_tokens
        completion.completion_tokens = chunk.completion_tokens
        if chunk.started_at is not None:
            completion.queue_s = max(0.0, chunk.started_at - pulled_at)
        if chunk.finish_reason == "error":
            completion.error = presentable(chunk.error or "the runner gave no reason")
            completion.text = completion.first_token_s = None
        else:
            completion.text = "".join(texts)
        return completion

    def under_way(self) -> list[int]:
        """Return how many chunks with text there are of each sample that has begun and not ended: about its tokens."""
        return [len(texts) for _, texts in self._open.values()]

    def abandoned(self) -> Iterator[Completion]:
        """Yield an error for every sample that was pulled and never finished."""
        for request_id, (_, samples) in self._waiting.items():
            for sample in sorted(samples):
                yield failed(request_id, "the runner ended without an answer", sample)


def complete(
    stream: StreamFn, requests: Iterable[Request], tick: Tick = no_tick, stopwatch: Stopwatch | None = None
) -> Iterator[Completion]:
    """Run `requests` through a runner's `stream` and yield each sample's completion as it finishes.

    Args:
        stream: Answers them.
        requests: What to answer.
        tick: Called before it is said of a sample that it got no answer.
        stopwatch: Times them; whoever made it can see what is under way.
    """
    stopwatch = stopwatch or Stopwatch()
    chunks = stream(stopwatch.watch(requests))
    try:
        for chunk in chunks:
            completion = stopwatch.add(chunk)
            if completion is not None:
                yield completion
    finally:
        if isinstance(chunks, Generator):
            chunks.close()
    for completion in stopwatch.abandoned():
        tick()
        yield completion

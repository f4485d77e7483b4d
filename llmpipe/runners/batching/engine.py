"""Continuous batching: rows share the model's decode calls, and a finished row's slot goes to the next one at once.

    look ahead   pull some requests, order them, find what their prompts share
    admit        give free slots to samples; copy the cache of a shared prefix
    prefill      compute what is left of the prompts of new rows, in chunks, in calls of their own
    decode       one token for every row in flight

Sizes itself from the first look ahead, and again when a row comes that needs a larger slot. When memory runs out the
rows in flight give up their caches, not their answers: a smaller context computes their tokens once more, and goes on.

In reproducible mode every row is computed in pieces of the same shape whatever the rows beside it: a prompt in calls of
its own, then one token per call. Some kernels give a product of matrices the same digits for any number of rows from
two on, but others for one: there a row is never decoded alone, an idle slot keeps it company.

Knows nothing of any backend: an `Executor` computes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from llmpipe.config import BatchingConfig
from llmpipe.exceptions import LLMInitializationError, LLMOutOfMemoryError
from llmpipe.records import Chunk, Request, error_chunk
from llmpipe.runners.batching import sizing
from llmpipe.runners.batching.executor import NO_NUMBERS, Context, Detokenizer, Executor, Sampler
from llmpipe.runners.batching.lookahead import Encode, LookAhead, Sample, Tokens
from llmpipe.runners.batching.sizing import Sizes
from llmpipe.runners.batching.throughput import Throughput
from llmpipe.runners.decoding import Answer
from llmpipe.stopwatch import Tick, no_tick

log = logging.getLogger(__name__)

PATIENCE = 4
"""Rows per slot that must finish after memory ran out before more slots are tried; doubles each time."""


@dataclass(eq=False)
class Row:
    """One sample in flight: everything about it, in one place."""

    sample: Sample
    sampler: Sampler
    answer: Answer
    text: Detokenizer
    tokens: Tokens
    """The prompt's, and all that were generated."""
    slot: int = -1
    """Where its cache is; -1 while it has none."""
    cached: int = 0
    """How many of its tokens are in the cache. The others are computed next; then comes a new one."""


@dataclass(eq=False)
class Prefix:
    """A shared prefix in a slot of its own."""

    slot: int
    tokens: Tokens = field(default_factory=list)
    used_at: int = 0


class Engine:
    """Runs samples through an executor.

    Args:
        executor: The loaded model.
        config: Sizes, and whether answers may depend on the batch.
        limit: Most tokens of prompt and completion per row.
    """

    def __init__(self, executor: Executor, config: BatchingConfig, limit: int) -> None:
        self._executor = executor
        self._config = config
        self.limit = limit
        self.context: Context | None = None
        self.cancelled: set[int] = set()
        """Ids of requests to give up; their rows leave before the next decode call."""
        self.most_slots = 0
        """Most rows that were in flight at once."""
        self.reasons: list[str] = []
        """Why the sizes are what they are."""
        self.throughput = Throughput()
        self.context_s = 0.0
        """Seconds spent making contexts."""
        self.device_bytes = 0
        """Most bytes of device memory that were in use after a context was made."""
        self.shrinks = 0
        """How often memory ran out and the context was made smaller."""
        self._cap: Sizes | None = None
        """The largest plan that is known to fit, once one did not."""
        self._finished_since = 0
        self._decode_s = 0.0
        self._rows: list[Row] = []
        self._prefilling: list[Row] = []
        self._suspended: list[Row] = []
        """Rows that gave up their slots and wait for others."""
        self._free: list[int] = []
        self._spoiled = False
        """Whether the context keeps a NaN that could get into new rows."""
        self._prefixes: list[Prefix] = []
        self._clock = 0
        self._tick: Tick = no_tick
        # What the backend refuses, it refuses now, and not when the first row comes.
        self._fit(sizing.smallest(config))

    @property
    def decode_s(self) -> float:
        """Seconds spent computing."""
        return self._decode_s + (self.context.decode_s if self.context is not None else 0.0)

    def stream(self, requests: Iterable[Request], encode: Encode, tick: Tick = no_tick) -> Iterator[Chunk]:
        """Answer `requests`, with a `tick` before each step; see `BaseLLMRunner.stream`."""
        self._tick = tick
        # Sharing a prefix computes a prompt in other pieces, whose sums may round otherwise.
        ahead = LookAhead(requests, encode, self.limit, share=not self._config.reproducible)
        count = sizing.look_ahead(sizing.wanted_slots(self._config, self._executor.footprint))
        self.cancelled.clear()
        self.throughput = Throughput()
        try:
            while True:
                if len(ahead.waiting) <= count // 2:
                    yield from ahead.fill(count)
                if self.cancelled:
                    yield from self._give_up(ahead)
                try:
                    yield from self._admit(ahead)
                    if self._prefilling:
                        yield from self._prefill()
                    elif self._rows:
                        yield from self._decode()
                    elif not ahead.waiting:
                        return
                except LLMOutOfMemoryError as error:
                    yield from self._shrink(str(error))
        finally:
            for row in [*self._rows, *self._suspended]:
                self._leave(row)

    def close(self) -> None:
        """Free the context."""
        if self.context is not None:
            self._decode_s += self.context.decode_s
            self.context.close()
            self.context = None
            self._spoiled = False

    # --- slots ----------------------------------------------------------------------------------------------------

    def _admit(self, ahead: LookAhead) -> Iterator[Chunk]:
        """Give free slots to waiting samples; make a larger context first where none of its slots would do."""
        self._grow()
        if self._spoiled:
            if self._rows:  # those in flight are the last of this context
                return
            self.close()
        while not self._rows and (ahead.waiting or self._suspended):
            try:
                self._fit(self._plan(ahead))
                break
            except LLMInitializationError as error:  # the longest cannot have a slot: the others may
                yield from self._refuse_longest(ahead, str(error))
        if self.context is None:
            return
        while self._free and self._suspended:
            self._seat(self._suspended.pop(0))
        while self._free and (sample := ahead.next(self.context.sizes.context)) is not None:
            self._enter(sample)
        self.most_slots = max(self.most_slots, len(self._rows))
        # Samples that still wait need larger slots: they get them once the rows in flight are done.
        self._compact()

    def _plan(self, ahead: LookAhead) -> Sizes:
        held = self.context.sizes.tokens if self.context is not None else 0
        samples = [*(row.sample for row in self._suspended), *ahead.waiting]
        free = self._executor.free_bytes()
        wanted = sizing.choose(self._config, self._executor.footprint, samples, self.limit, held, free)
        return wanted if self._cap is None else wanted.within(self._cap)

    def _fit(self, plan: Sizes) -> None:
        """See to it that there is a context for `plan`, with fewer slots where memory has no room for so many.

        Raises:
            LLMInitializationError: not even one slot can be had, or not as many as are set by hand.
        """
        if self.context is not None and self.context.sizes.covers(plan):
            return
        self.close()
        started = time.perf_counter()
        smaller: Sizes | None = plan
        while smaller is not None and self.context is None:
            plan = smaller
            try:
                self.context = self._executor.context(plan)
            except LLMInitializationError as error:
                if (
                    self._config.slots != "auto"
                    or plan.slots + plan.prefixes == 1
                    or (smaller := plan.halved()) is None
                ):
                    raise
                log.warning("%s: trying %d slots", error, smaller.slots)
        self.context_s += time.perf_counter() - started
        self.device_bytes = max(self.device_bytes, self._executor.used_device_bytes())
        for reason in plan.reasons:
            log.info("%s", reason)
        self.reasons += [reason for reason in plan.reasons if reason not in self.reasons]
        self._free = list(range(plan.slots))
        self._prefixes = [Prefix(plan.slots + i) for i in range(plan.prefixes)]

    def _enter(self, sample: Sample) -> None:
        answer = Answer(sample.request, sample.number, len(sample.prompt), sample.truncated, self.limit)
        sampler, text = self._executor.sampler(sample), self._executor.detokenizer(sample)
        row = Row(sample, sampler, answer, text, list(sample.prompt))
        self._seat(row)
        row.cached, copied = self._copy_prefix(sample, row.slot)
        answer.cached(copied)

    def _seat(self, row: Row) -> None:
        """Give a row the lowest free slot: neighbours are computed together more cheaply."""
        row.slot = min(self._free)
        self._free.remove(row.slot)
        self._rows.append(row)
        self._prefilling.append(row)

    def _unseat(self, row: Row) -> None:
        assert self.context is not None
        self._rows.remove(row)
        if row in self._prefilling:
            self._prefilling.remove(row)
        self._free.append(row.slot)
        self.context.forget(row.slot)
        row.slot, row.cached = -1, 0

    def _leave(self, row: Row) -> None:
        if row in self._suspended:
            self._suspended.remove(row)
        else:
            self._unseat(row)
        self._finished_since += 1
        row.sampler.close()

    def _compact(self) -> None:
        """Move the highest rows into gaps below them: a batch over neighbouring slots is computed in fewer pieces."""
        assert self.context is not None
        while self._rows and self._free:
            last, gap = max(self._rows, key=lambda row: row.slot), min(self._free)
            if gap > last.slot:
                return
            self.context.copy(last.slot, gap)
            self.context.forget(last.slot)
            self._free.remove(gap)
            self._free.append(last.slot)
            last.slot = gap

    def _give_up(self, ahead: LookAhead) -> Iterator[Chunk]:
        """End the rows and waiting samples of cancelled requests."""
        ids = set(self.cancelled)
        self.cancelled -= ids
        gone = [sample for sample in ahead.waiting if sample.request.id in ids]
        ahead.waiting = [sample for sample in ahead.waiting if sample.request.id not in ids]
        for row in [row for row in (*self._rows, *self._suspended) if row.sample.request.id in ids]:
            self._leave(row)
            gone.append(row.sample)
        yield from (error_chunk(sample.request.id, "cancelled", sample.number) for sample in gone)

    # --- memory ---------------------------------------------------------------------------------------------------

    def _shrink(self, reason: str) -> Iterator[Chunk]:
        """Make do with half the context after `reason`; a row that does not fit even by itself is an error."""
        assert self.context is not None
        smaller = self.context.sizes.halved()
        if smaller is None:
            row = next(iter(self._prefilling or self._rows))
            yield row.answer.fail(f"{reason} for this row alone: use a smaller sampling.max_tokens or backend.context")
            self._leave(row)
            self._cap = None  # it was this row
            return
        self.shrinks += 1
        self._finished_since = 0
        self._cap = smaller
        log.warning("%s: going on with %d slots and %d tokens per call", reason, smaller.slots, smaller.batch_tokens)
        self._suspend_all()

    def _grow(self) -> None:
        """Try twice the slots again, once enough rows have finished since memory ran out."""
        if self._cap is None or self._finished_since < PATIENCE * 2 ** min(self.shrinks, 5) * self._cap.slots:
            return
        self._finished_since = 0
        self._cap = self._cap.doubled()
        wanted = sizing.wanted_slots(self._config, self._executor.footprint)
        log.info("trying %d slots again", min(self._cap.slots, wanted))
        if self._cap.slots >= wanted and self._cap.batch_tokens >= self._config.batch_tokens:
            self._cap = None
        self._suspend_all()

    def _suspend_all(self) -> None:
        """Take all rows from their slots, in the order in which they came, and free the context."""
        rows = list(self._rows)
        for row in rows:
            self._unseat(row)
        self._suspended = rows + self._suspended
        self.close()

    def _refuse_longest(self, ahead: LookAhead, reason: str) -> Iterator[Chunk]:
        """End the samples that need the most tokens."""
        most = max(row.sample.need for row in self._suspended) if self._suspended else 0
        for row in [row for row in self._suspended if row.sample.need == most]:
            yield row.answer.fail(reason)
            self._leave(row)
        if not most:
            yield from (error_chunk(sample.request.id, reason, sample.number) for sample in ahead.take_longest())

    def _spoil(self) -> None:
        """Let no row begin in this context any more: a row of NaN was in it."""
        self._spoiled = self._executor.keeps_nan
        for row in [row for row in self._prefilling if self._spoiled and not row.cached]:
            self._unseat(row)
            self._suspended.append(row)

    # --- shared prefixes ------------------------------------------------------------------------------------------

    def _copy_prefix(self, sample: Sample, slot: int) -> tuple[int, int]:
        """Fill `slot` with what the sample shares, computed now if need be: a common beginning, then the whole prompt.

        Returns:
            Tokens now in the slot's cache, and how many of them this row did not cost.
        """
        assert self.context is not None
        if not sample.shared or not self._prefixes:
            return 0, 0
        self._clock += 1
        # All but the last token, whose logits are needed, may come from a prefix, whoever it was computed for.
        body = sample.prompt[:-1]
        known = max(self._prefixes, key=lambda prefix: _begins(body, prefix.tokens))
        reused = length = _begins(body, known.tokens)
        for end in (sample.base, sample.shared):
            if length:
                known.used_at = self._clock
            if end > length:
                oldest = min(self._prefixes, key=lambda prefix: prefix.used_at)
                self._compute_prefix(oldest, known if length else None, sample.prompt[:end])
                known, length = oldest, end
        known.used_at = self._clock
        self.context.copy(known.slot, slot)
        return length, reused

    def _compute_prefix(self, prefix: Prefix, base: Prefix | None, tokens: Tokens) -> None:
        """Put `tokens` into a prefix's slot, beginning with a copy of `base`."""
        assert self.context is not None
        done = len(base.tokens) if base is not None else 0
        if base is not prefix:
            self.context.forget(prefix.slot)
            if base is not None:
                self.context.copy(base.slot, prefix.slot)
        prefix.tokens = []  # until all of it is computed
        batch = self.context.batch
        for start in range(done, len(tokens), batch.capacity):
            batch.clear()
            batch.add(tokens[start : start + batch.capacity], start, prefix.slot, False)
            self._compute(is_prefill=True)
        prefix.tokens = tokens

    # --- computing ------------------------------------------------------------------------------------------------

    def _compute(self, is_prefill: bool) -> None:
        """Compute the batch; every step of the engine is one call of this."""
        assert self.context is not None
        self._tick()
        with self.throughput.step(self.context.batch.size, is_prefill):
            self.context.decode()

    def _prefill(self) -> Iterator[Chunk]:
        """Compute one batch of tokens of new rows; those that lack none get the next one."""
        assert self.context is not None
        batch = self.context.batch
        batch.clear()
        outputs: list[Row] = []
        for row in sorted(self._prefilling, key=lambda row: row.slot):
            if not batch.room or (batch.size and self._config.reproducible):
                break
            part = row.tokens[row.cached : row.cached + batch.room]
            done = row.cached + len(part) == len(row.tokens)
            batch.add(part, row.cached, row.slot, done)
            row.cached += len(part)
            if done:
                outputs.append(row)
        self._compute(is_prefill=True)
        for row in outputs:
            self._prefilling.remove(row)
        yield from self._sample(outputs, is_prefill=True)

    def _decode(self) -> Iterator[Chunk]:
        """Compute one token for every row."""
        assert self.context is not None
        rows = sorted(self._rows, key=lambda row: row.slot)
        tokens, positions = [row.tokens[-1] for row in rows], [row.cached for row in rows]
        slots = [row.slot for row in rows]
        company = self._config.reproducible and self._executor.never_alone and len(rows) == 1
        if company:  # any token will do, and it is forgotten again
            tokens, positions, slots = [*tokens, tokens[0]], [*positions, 0], [*slots, slots[0] + 1]
        self.context.batch.set_columns(tokens, positions, slots)
        self._compute(is_prefill=False)
        if company:
            self.context.forget(slots[-1])
        for row in rows:
            row.cached += 1
        yield from self._sample(rows, is_prefill=False)

    def _sample(self, rows: list[Row], is_prefill: bool) -> Iterator[Chunk]:
        """Choose a token for each of `rows`, whose logits are the outputs of the batch, in this order."""
        assert self.context is not None
        # All tokens are taken before the first chunk is given out: whoever gets it may do as he likes meanwhile.
        with self.throughput.step(0, is_prefill):
            tokens = self.context.choose([row.sampler for row in rows])
        chunks = [self._take(row, token) for row, token in zip(rows, tokens, strict=True)]
        yield from (chunk for chunk in chunks if chunk is not None)

    def _take(self, row: Row, token: int) -> Chunk | None:
        """Add a token to its row; return the chunk it completes, if any."""
        if token < 0:
            self._spoil()
            chunk: Chunk | None = row.answer.fail(NO_NUMBERS)
        elif row.answer.ends_at(token, self._executor.is_end(token)):
            chunk = row.answer.end()
        else:
            row.tokens.append(token)
            chunk = row.answer.add(row.text.push(token))
        if row.answer.finished:
            self._leave(row)
        return chunk


def _begins(tokens: Tokens, start: Tokens) -> int:
    """Return the length of `start` where `tokens` begin with it, else 0."""
    return len(start) if tokens[: len(start)] == start else 0

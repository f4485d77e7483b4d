"""Which rows are computed when: who has a slot, who waits for one, and what is done when memory runs out.

    pull      look ahead at some requests, order them, find what their prompts share
    admit     give free slots to samples, and make a larger context where one needs a larger slot
    share     copy what is computed of a shared prefix, or compute it
    prefill   compute what is left of the prompts of new rows, in chunks, in calls of their own
    decode    one token for every row in flight

When memory runs out, the rows in flight give up their caches, not their answers: they are suspended, a smaller context
computes their tokens once more, and they go on. Once enough rows have finished, a larger one is tried again.

In reproducible mode every call has the same shape for a row, whatever rows are beside it: each piece of a prompt is
computed in a call of its own, and then one token per call. What is left is the number of rows in such a call: some
kernels sum a product of matrices in one order for a single row and in another for any number from two on. Where a
backend has such, a row is never decoded alone: a token in an idle slot keeps it company.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from llmpipe.config import BatchingConfig
from llmpipe.exceptions import LLMInitializationError
from llmpipe.records import Chunk
from llmpipe.runners.batching.executor import NO_NUMBERS, Context, Executor
from llmpipe.runners.batching.lookahead import LookAhead, Sample
from llmpipe.runners.batching.prefixes import PrefixCache
from llmpipe.runners.batching.sequence import Sequence
from llmpipe.runners.batching.sizing import Sizes
from llmpipe.runners.batching.step import Step

log = logging.getLogger(__name__)

LOOK_AHEAD = 4
"""Slots' worth of samples that wait."""
WRITES = 8
"""Steps in which rows write between two in which others are read, where there is no end of others."""
PATIENCE = 4
"""Rows per slot that must finish after memory ran out before more slots are tried; doubles each time."""


class Scheduler:
    """Decides what each step computes.

    Args:
        executor: The loaded model.
        config: Sizes, and whether answers may depend on the batch.
        limit: Most tokens of prompt and completion per row.

    Raises:
        LLMInitializationError: the backend cannot make a context of the least size.
    """

    def __init__(self, executor: Executor, config: BatchingConfig, limit: int) -> None:
        self._executor = executor
        self._config = config
        self._limit = limit
        self._context: Context | None = None
        self.sizes = replace(executor.ideal, slots=1)
        """Sizes of the current context, or of the last one."""
        self.cancelled: set[int] = set()
        """Ids of requests to give up; their rows leave before the next step."""
        self.most_rows_in_flight = 0
        self.context_s = 0.0
        """Seconds spent making contexts."""
        self.device_bytes = 0
        """Most bytes of device memory that were in use after a context was made."""
        self.shrinks = 0
        """How often memory ran out and the context was made smaller."""
        self._ahead: LookAhead
        self._chunks: list[Chunk] = []
        self._running: list[Sequence] = []
        """Rows that have slots, in the order in which they came."""
        self._prefilling: list[Sequence] = []
        """Running rows with more than one token still to be computed: their prompt, or what they lost."""
        self._sharing: list[Sequence] = []
        """Running rows that wait for the cache of a prefix that they share with others."""
        self._suspended: list[Sequence] = []
        """Rows that gave up their slots and wait for new ones."""
        self._free: list[int] = []
        self._prefixes: PrefixCache
        self._writes_left = 0
        """How many steps are for rows that write before others are read."""
        self._spoiled = False
        """Whether the context keeps a NaN that could get into new rows."""
        self._cap: Sizes | None = None
        """The largest sizes that are known to fit, once some did not."""
        self._finished_since = 0
        # What the backend refuses, it refuses now, and not when the first row comes.
        self._fit(self.sizes)

    def begin(self, ahead: LookAhead) -> None:
        """Begin a stream."""
        self._ahead = ahead
        self.cancelled.clear()

    def end(self) -> None:
        """End the stream, wherever it is."""
        for sequence in [*self._running, *self._suspended]:
            self._leave(sequence)
        self._prefixes.drop_unfinished()
        self._chunks.clear()
        del self._ahead  # the caller's requests are no longer held

    @property
    def context(self) -> Context:
        """What a step is computed in; there is one whenever a row is in flight."""
        assert self._context is not None
        return self._context

    @property
    def is_done(self) -> bool:
        """Whether every request has its answer."""
        return self._ahead.is_exhausted and not (self._ahead.waiting or self._running or self._suspended)

    def schedule(self) -> Step | None:
        """Put into the context's batch what is computed next; return what it is, or None where nothing is."""
        count = LOOK_AHEAD * self._executor.ideal.slots
        if len(self._ahead.waiting) <= count // 2:
            self._chunks += self._ahead.fill(count)
            if self._chunks:  # whoever drives the stream may want no more
                return None
        if self.cancelled:
            self._drop_cancelled()
        self._admit()
        if not self._executor.is_static:
            self._compact()
        if self._writes_left and (step := self._decode()) is not None:
            self._writes_left -= 1
            return step
        # In reproducible mode all rows are read first: the slot beside a lone one is to be idle, see `_decode`.
        self._writes_left = WRITES if self._ahead.is_live and not self._config.reproducible else 0
        return self._share() or self._prefill() or self._decode()

    def advance(self, step: Step, tokens: list[int]) -> None:
        """Take what a step computed, and the next token of each of its outputs."""
        for part, count in step.parts:
            part.cached += count
        if step.idle_slot is not None:
            self.context.forget(step.idle_slot)
        if step.is_prefill:
            self._prefilling = [sequence for sequence in self._prefilling if sequence not in step.outputs]
        for sequence, token in zip(step.outputs, tokens, strict=True):
            if token < 0:
                self._spoil()
                self._chunks.append(sequence.fail(NO_NUMBERS))
            elif (chunk := sequence.add(token, self._executor.is_end(token))) is not None:
                self._chunks.append(chunk)
            if sequence.finished:
                self._leave(sequence)

    def shrink(self, reason: str) -> None:
        """Make do with half the context after `reason`; a row that does not fit even by itself is an error."""
        smaller = self.context.sizes.halved()
        if smaller is None:
            self._fail(
                self._running[0], f"{reason} for this row alone: use a smaller sampling.max_tokens or backend.context"
            )
            self._cap = None  # it was this row
            return
        self.shrinks += 1
        self._finished_since = 0
        self._cap = smaller
        log.warning("%s: going on with %s", reason, smaller)
        self._suspend_all()

    def take_chunks(self) -> list[Chunk]:
        """Return what the rows had to tell since the last call."""
        chunks, self._chunks = self._chunks, []
        return chunks

    def close(self) -> None:
        """Free the context."""
        if self._context is not None:
            self._context.close()
            self._context = None
            self._spoiled = False

    # --- steps ----------------------------------------------------------------------------------------------------

    def _share(self) -> Step | None:
        """Copy caches of shared prefixes to new rows; return the step that computes the next missing one."""
        while self._sharing:
            if (step := self._prefixes.provide(self._sharing[0])) is not None:
                return step
            self._sharing.pop(0)
        return None

    def _prefill(self) -> Step | None:
        """Put tokens of new rows into the batch, as many as it takes; a row with none left over gets its next token."""
        if not self._prefilling:
            return None
        batch = self.context.batch
        batch.clear()
        step = Step([], [])
        for sequence in sorted(self._prefilling, key=_slot):
            if not batch.room or (batch.size and self._config.reproducible):
                break
            left = sequence.tokens[sequence.cached :]
            count = batch.add(left, sequence.cached, sequence.slot, output_last=True)
            step.parts.append((sequence, count))
            if count == len(left):
                step.outputs.append(sequence)
        return step

    def _decode(self) -> Step | None:
        """Compute the last token of every row that has been read."""
        rows = sorted((row for row in self._running if row not in self._prefilling), key=_slot)
        if not rows:
            return None
        tokens, positions = [row.tokens[-1] for row in rows], [row.cached for row in rows]
        slots = [row.slot for row in rows]
        step = Step([(row, 1) for row in rows], rows, is_prefill=False)
        if len(rows) == 1 and self._config.reproducible and self._executor.never_alone:
            step.idle_slot = slots[0] + 1  # its token does not matter: nobody reads its logits
            self.context.forget(step.idle_slot)  # where no token could be chosen, the last one is still there
            tokens, positions, slots = [*tokens, tokens[0]], [*positions, 0], [*slots, step.idle_slot]
        self.context.batch.set_columns(tokens, positions, slots)
        return step

    # --- slots ----------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give free slots to waiting samples; make a larger context first where none of its slots would do."""
        self._grow()
        if self._running and (self._spoiled or self._executor.is_static):
            return  # those in flight are the last of this context, or of this batch
        if self._spoiled:
            self.close()
        while not self._running and (self._ahead.waiting or self._suspended):
            try:
                self._fit(self._wanted())
                break
            except LLMInitializationError as error:  # the longest cannot have a slot: the others may
                self._refuse_longest(str(error))
        if self._context is None:
            return
        while self._free and self._suspended:
            self._seat(self._suspended.pop(0))
        # Samples that need larger slots than these get them once the rows in flight are done.
        while self._free and (sample := self._ahead.next(self._context.sizes.context)) is not None:
            sequence = self._sequence(sample)
            self._seat(sequence)
            self._sharing.append(sequence)
        self.most_rows_in_flight = max(self.most_rows_in_flight, len(self._running))

    def _sequence(self, sample: Sample) -> Sequence:
        sampler, detokenizer = self._executor.sampler(sample), self._executor.detokenizer(sample)
        return Sequence(sample, sampler, detokenizer, self._limit)

    def _seat(self, sequence: Sequence) -> None:
        """Give a row the lowest free slot: neighbours are computed together more cheaply."""
        sequence.slot = min(self._free)
        self._free.remove(sequence.slot)
        self._running.append(sequence)
        self._prefilling.append(sequence)

    def _unseat(self, sequence: Sequence) -> None:
        for rows in (self._running, self._prefilling, self._sharing):
            if sequence in rows:
                rows.remove(sequence)
        self._free.append(sequence.slot)
        self.context.forget(sequence.slot)
        sequence.slot, sequence.cached = -1, 0

    def _leave(self, sequence: Sequence) -> None:
        if sequence in self._suspended:
            self._suspended.remove(sequence)
        else:
            self._unseat(sequence)
        self._finished_since += 1
        sequence.sampler.close()

    def _fail(self, sequence: Sequence, reason: str) -> None:
        self._chunks.append(sequence.fail(reason))
        self._leave(sequence)

    def _compact(self) -> None:
        """Move the highest rows into gaps below them: a batch over neighbouring slots is computed in fewer pieces.

        Also where no row may begin any more: in reproducible mode a row in a piece of its own would be computed alone.
        """
        while self._running and self._free:
            last, gap = max(self._running, key=_slot), min(self._free)
            if gap > last.slot:
                return
            self.context.copy(last.slot, gap)
            self.context.forget(last.slot)
            self._free.remove(gap)
            self._free.append(last.slot)
            last.slot = gap

    def _drop_cancelled(self) -> None:
        """End the rows and waiting samples of cancelled requests."""
        ids = set(self.cancelled)
        self.cancelled -= ids
        self._chunks += [sample.error_chunk("cancelled") for sample in self._ahead.take_requests(ids)]
        for sequence in [*self._running, *self._suspended]:
            if sequence.sample.request.id in ids:
                self._fail(sequence, "cancelled")

    def _spoil(self) -> None:
        """Let no row begin in this context any more: a row of NaN was in it."""
        self._spoiled = self._executor.keeps_nan
        for sequence in [sequence for sequence in self._prefilling if self._spoiled and not sequence.cached]:
            self._unseat(sequence)
            self._suspended.append(sequence)

    # --- memory ---------------------------------------------------------------------------------------------------

    def _wanted(self) -> Sizes:
        """Return the sizes for the rows that wait."""
        held = self._context.sizes.tokens if self._context is not None else 0
        samples = [*(sequence.sample for sequence in self._suspended), *self._ahead.waiting]
        wanted = self._executor.sizes(samples, self._limit, held, self._ahead.is_live)
        return wanted if self._cap is None else wanted.within(self._cap)

    def _fit(self, sizes: Sizes) -> None:
        """See to it that there is a context for `sizes`, with fewer slots where memory has no room for so many.

        Raises:
            LLMInitializationError: not even one slot can be had, or not as many as are set by hand.
        """
        if self._context is not None and self._context.sizes.covers(sizes):
            return
        self.close()
        started = time.perf_counter()
        while self._context is None:
            try:
                self._context = self._executor.context(sizes)
            except LLMInitializationError as error:
                smaller = sizes.halved()
                if self._config.slots != "auto" or sizes.slots + sizes.prefixes == 1 or smaller is None:
                    raise
                log.warning("%s: trying %d slots", error, smaller.slots)
                sizes = smaller.because(f"{smaller.slots} slots instead: no context could be made for {sizes.slots}")
        self.context_s += time.perf_counter() - started
        self.device_bytes = max(self.device_bytes, self._executor.used_device_bytes())
        for reason in sizes.reasons:
            log.info("%s", reason)
        self.sizes = sizes
        self._free = list(range(sizes.slots))
        self._prefixes = PrefixCache(self._context)

    def _grow(self) -> None:
        """Try twice the slots again, once enough rows have finished since memory ran out."""
        if self._cap is None or self._finished_since < PATIENCE * 2 ** min(self.shrinks, 5) * self._cap.slots:
            return
        self._finished_since = 0
        self._cap = self._cap.doubled()
        ideal = self._executor.ideal
        log.info("trying %d slots again", min(self._cap.slots, ideal.slots))
        if self._cap.slots >= ideal.slots and self._cap.batch_tokens >= ideal.batch_tokens:
            self._cap = None
        self._suspend_all()

    def _suspend_all(self) -> None:
        """Take all rows from their slots, in the order in which they came, and free the context."""
        running = list(self._running)
        for sequence in running:
            self._unseat(sequence)
        self._suspended = running + self._suspended
        self.close()

    def _refuse_longest(self, reason: str) -> None:
        """End the samples that need the most tokens."""
        if not self._suspended:
            self._chunks += [sample.error_chunk(reason) for sample in self._ahead.take_longest()]
            return
        most = max(sequence.sample.need for sequence in self._suspended)
        for sequence in [sequence for sequence in self._suspended if sequence.sample.need == most]:
            self._fail(sequence, reason)


def _slot(sequence: Sequence) -> int:
    return sequence.slot

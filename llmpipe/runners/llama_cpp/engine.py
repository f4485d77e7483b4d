"""Continuous batching: rows share the model's decode calls, and a finished row's slot goes to the next one at once.

    admit     pull requests while slots are free
    prefill   compute the prompts of new rows, in chunks, in calls of their own
    decode    one token for every row in flight

Knows nothing of files, configs beyond its own, or what becomes of the text.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from llmpipe.config import LlamaCppConfig, Switch
from llmpipe.exceptions import LLMInferenceError, LLMInitializationError
from llmpipe.records import Chunk, Request
from llmpipe.runners.base import error_chunks
from llmpipe.runners.decoding import StopStrings, Utf8Stream
from llmpipe.runners.llama_cpp import log
from llmpipe.runners.llama_cpp.model import Model
from llmpipe.runners.llama_cpp.sampler import Sampler, is_plain_greedy

CACHE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "bf16": 30}
FLASH = {Switch.auto: -1, Switch.off: 0, Switch.on: 1}

Tokens = list[int]
Encode = Callable[[Request], tuple[Tokens, int]]
"""Request → the prompt's tokens and how many were cut off on the left; a ValueError makes an error row."""


@dataclass
class Row:
    """One sample in flight: everything about it, in one place."""

    request: Request
    sample: int
    prompt: Tokens
    truncated: int
    slot: int
    sampler: Sampler | None
    stops: StopStrings
    started_at: float
    text: Utf8Stream = field(default_factory=Utf8Stream)
    cached: int = 0
    """Tokens of this row in the KV cache."""
    generated: int = 0
    next_token: int = -1

    @property
    def prefilled(self) -> bool:
        """Whether all of the prompt is in the cache."""
        return self.cached >= len(self.prompt)


class Batch:
    """The arrays of one decode call, filled through numpy and read by llama.cpp in place."""

    def __init__(self, capacity: int) -> None:
        self.tokens = np.zeros(capacity, np.int32)
        self.positions = np.zeros(capacity, np.int32)
        self.slots = np.zeros(capacity, np.int32)
        self.outputs = np.zeros(capacity, np.int8)
        self._ones = np.ones(capacity, np.int32)
        base, step = self.slots.ctypes.data, self.slots.itemsize
        self._slot_pointers = np.arange(base, base + capacity * step, step, dtype=np.uintp)
        self.struct = llama_cpp.llama_batch()
        for name, array in (
            ("token", self.tokens),
            ("pos", self.positions),
            ("n_seq_id", self._ones),
            ("seq_id", self._slot_pointers),
            ("logits", self.outputs),
        ):
            kind = dict(llama_cpp.llama_batch._fields_)[name]
            setattr(self.struct, name, ctypes.cast(array.ctypes.data, kind))
        self.size = 0

    def clear(self) -> None:
        """Begin a new call."""
        self.size = 0

    def add(self, tokens: Tokens, position: int, slot: int, output_last: bool) -> None:
        """Append successive tokens of one slot; logits are computed for the last one where asked."""
        span = slice(self.size, self.size + len(tokens))
        self.tokens[span] = tokens
        self.positions[span] = np.arange(position, position + len(tokens))
        self.slots[span] = slot
        self.outputs[span] = 0
        self.outputs[span.stop - 1] = output_last
        self.size = self.struct.n_tokens = span.stop


class Engine:
    """A llama.cpp context and the rows in it.

    Args:
        model: The loaded model.
        config: Sizes and arithmetic.
        slots: Rows in flight at once.
        context: Tokens per row.
        threads: CPU threads.

    Raises:
        LLMInitializationError: llama.cpp cannot make such a context, for want of memory or of a feature.
    """

    def __init__(self, model: Model, config: LlamaCppConfig, slots: int, context: int, threads: int) -> None:
        self._model = model
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = slots
        params.n_ctx = slots * context
        params.n_batch = max(config.batch_tokens, slots)
        params.n_ubatch = min(config.micro_batch_tokens, params.n_batch)
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = FLASH[Switch.off if config.reproducible else config.flash_attention]
        params.type_k, params.type_v = CACHE_TYPES[config.cache_type_k], CACHE_TYPES[config.cache_type_v]
        params.kv_unified = False
        params.no_perf = True
        self._context: Any = llama_cpp.llama_init_from_model(model.handle, params)
        if not self._context:
            raise LLMInitializationError(
                f"llama.cpp cannot make {slots} slots of {context} tokens: {log.last_errors() or 'no reason given'}; "
                f"try a smaller backend.slots or backend.context"
            )
        self._memory = llama_cpp.llama_get_memory(self._context)
        self.context = min(context, llama_cpp.llama_n_ctx_seq(self._context))
        self.batch_tokens: int = llama_cpp.llama_n_batch(self._context)
        self._batch = Batch(self.batch_tokens)
        self._rows: list[Row] = []
        self._free = list(range(slots))
        self.decode_s = 0.0
        """Seconds spent inside llama_decode since loading."""

    def stream(self, requests: Iterable[Request], encode: Encode) -> Iterator[Chunk]:
        """Answer `requests`; see `BaseLLMRunner.stream`."""
        source = iter(requests)
        waiting: deque[tuple[Request, int, Tokens, int]] = deque()
        try:
            while True:
                yield from self._admit(source, waiting, encode)
                if not self._rows:
                    return
                if any(not row.prefilled for row in self._rows):
                    yield from self._prefill()
                else:
                    yield from self._decode()
        finally:
            for row in list(self._rows):
                self._leave(row)

    def close(self) -> None:
        """Free the context; the engine cannot be used afterwards."""
        if self._context:
            llama_cpp.llama_free(self._context)
            self._context = None

    def _admit(
        self, source: Iterator[Request], waiting: deque[tuple[Request, int, Tokens, int]], encode: Encode
    ) -> Iterator[Chunk]:
        """Give free slots to samples that wait, pulling requests as needed."""
        while self._free:
            if not waiting:
                request = next(source, None)
                if request is None:
                    return
                try:
                    prompt, truncated = encode(request)
                except ValueError as error:
                    yield from error_chunks(request, str(error))
                    continue
                waiting.extend((request, sample, prompt, truncated) for sample in request.samples)
            if waiting:
                self._enter(*waiting.popleft())

    def _enter(self, request: Request, sample: int, prompt: Tokens, truncated: int) -> None:
        sampling, seed = request.sampling, request.seed_of(sample)
        greedy = is_plain_greedy(sampling)
        sampler = None if greedy else Sampler(sampling, seed, self._model, prompt, self.context)
        # The lowest free slot: llama.cpp computes neighbouring sequences together.
        slot = min(self._free)
        self._free.remove(slot)
        stops = StopStrings(sampling.stop)
        self._rows.append(Row(request, sample, prompt, truncated, slot, sampler, stops, time.perf_counter()))

    def _leave(self, row: Row) -> None:
        self._rows.remove(row)
        self._free.append(row.slot)
        llama_cpp.llama_memory_seq_rm(self._memory, row.slot, -1, -1)
        if row.sampler is not None:
            row.sampler.close()

    def _prefill(self) -> Iterator[Chunk]:
        """Compute one batch of prompt tokens; rows whose prompt is complete get their first token."""
        self._batch.clear()
        complete: list[tuple[Row, int]] = []
        for row in sorted(self._rows, key=lambda row: row.slot):
            room = self.batch_tokens - self._batch.size
            if row.prefilled or not room:
                continue
            part = row.prompt[row.cached : row.cached + room]
            done = row.cached + len(part) == len(row.prompt)
            self._batch.add(part, row.cached, row.slot, done)
            row.cached += len(part)
            if done:
                complete.append((row, self._batch.size - 1))
        yield from self._compute(complete)

    def _decode(self) -> Iterator[Chunk]:
        """Compute one token for every row."""
        self._batch.clear()
        rows = sorted(self._rows, key=lambda row: row.slot)
        for row in rows:
            self._batch.add([row.next_token], row.cached, row.slot, True)
            row.cached += 1
        yield from self._compute([(row, i) for i, row in enumerate(rows)])

    def _compute(self, outputs: list[tuple[Row, int]]) -> Iterator[Chunk]:
        """Run the batch and sample a token for each of `outputs`: a row and the index of its logits in the batch."""
        started = time.perf_counter()
        status = llama_cpp.llama_decode(self._context, self._batch.struct)
        self.decode_s += time.perf_counter() - started
        if status:
            reason = "no room in the KV cache" if status == 1 else log.last_errors() or "no reason given"
            raise LLMInferenceError(f"llama_decode failed with status {status}: {reason}")
        if not outputs:
            return
        tokens: npt.NDArray[np.int64] | None = None
        if any(row.sampler is None for row, _ in outputs):
            logits = llama_cpp.llama_get_logits(self._context)
            tokens = np.ctypeslib.as_array(logits, (len(outputs), self._model.n_vocab)).argmax(axis=1)
        for i, (row, index) in enumerate(outputs):
            if row.sampler is not None:
                token = row.sampler.sample(self._context, index)
            else:
                assert tokens is not None
                token = int(tokens[i])
            chunk = self._take(row, token)
            if chunk is not None:
                yield chunk

    def _take(self, row: Row, token: int) -> Chunk | None:
        """Add a sampled token to its row; return the chunk it completes, if any."""
        sampling, text, reason = row.request.sampling, "", None
        if self._model.is_end(token) and not sampling.ignore_eos:
            reason = "stop"
        else:
            row.generated += 1
            row.next_token = token
            text = row.stops.push(row.text.push(self._model.piece(token)))
            if row.stops.stopped:
                reason = "stop"
            elif row.generated >= sampling.max_tokens or row.cached >= self.context:
                reason = "length"
        if reason is None:
            return Chunk(row.request.id, row.sample, text) if text else None
        self._leave(row)
        return Chunk(
            row.request.id,
            row.sample,
            text + row.stops.flush(),
            reason,
            prompt_tokens=len(row.prompt),
            cached_prompt_tokens=0,
            truncated_prompt_tokens=row.truncated,
            completion_tokens=row.generated,
            started_at=row.started_at,
        )

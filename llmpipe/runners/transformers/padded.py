"""Padded batches: the path for models whose attention cannot be replaced. Rows go through the model together.

A batch is left-padded, with masked padding and positions counted from each row's first token, so that a row's answer
is what it would be alone. Rows of similar length share a batch, and leave as they finish. When memory runs out, the
rows of a batch go on in two smaller ones. Knows nothing of files or of how the model was loaded.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from llmpipe.exceptions import LLMOutOfMemoryError
from llmpipe.records import Chunk, Request
from llmpipe.runners.batching import NO_NUMBERS
from llmpipe.runners.batching.lookahead import Encode, LookAhead, Sample
from llmpipe.runners.batching.throughput import Throughput
from llmpipe.runners.decoding import Answer
from llmpipe.runners.transformers import memory
from llmpipe.runners.transformers.detokenizer import Detokenizer
from llmpipe.runners.transformers.sampler import Sampler, choose
from llmpipe.stopwatch import Tick, no_tick

log = logging.getLogger(__name__)

LOOK_AHEAD = 4
"""Batches' worth of rows that are pulled at once and sorted by length, so that little is padding."""
PATIENCE = 8
"""Batches that must succeed after memory ran out before twice the rows are tried; doubles each time."""


@dataclass(eq=False)
class Row:
    """One sample in flight: everything about it, in one place."""

    answer: Answer
    tokens: list[int]
    """The prompt's, and all that were generated."""
    sampler: Sampler
    text: Detokenizer


class PaddedEngine:
    """Runs rows through a causal model of transformers in padded batches.

    Args:
        model: The model, in eval mode.
        tokenizer: Its tokenizer.
        end_tokens: Ids that end a generation.
        slots: Rows per batch.
        context: Most tokens of prompt and completion.
    """

    def __init__(self, model: Any, tokenizer: Any, end_tokens: set[int], slots: int, context: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens
        self.slots = slots
        self.limit = context
        self.cancelled: set[int] = set()
        """Ids of requests to give up; their rows leave before the next forward pass."""
        self.throughput = Throughput()
        self.shrinks = 0
        """How often memory ran out and batches were made smaller."""
        self._most = slots
        self._batches_since = 0
        self._tick: Tick = no_tick
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_logits_to_keep = "logits_to_keep" in parameters
        # Purely recurrent models, such as Mamba, call their cache by another name.
        self._is_recurrent = "cache_params" in parameters
        self._cache_name = "cache_params" if self._is_recurrent else "past_key_values"

    def stream(self, requests: Iterable[Request], encode: Encode, tick: Tick = no_tick) -> Iterator[Chunk]:
        """Answer `requests`, with a `tick` before each forward pass; see `BaseLLMRunner.stream`."""
        self._tick = tick
        ahead = LookAhead(requests, encode, self.limit, share=False)
        self.cancelled.clear()
        self.throughput = Throughput()
        while True:
            if len(ahead.waiting) < self._most:
                yield from ahead.fill(self._most * LOOK_AHEAD)
            if not ahead.waiting:
                return
            count = min(self._most, len(ahead.waiting))
            yield from self._run([self._row(ahead.waiting.pop()) for _ in range(count)])
            self._grow()

    def _row(self, sample: Sample) -> Row:
        request = sample.request
        answer = Answer(request, sample.number, len(sample.prompt), sample.truncated, self.limit)
        sampler = Sampler(request.sampling, request.seed_of(sample.number), sample.prompt)
        return Row(answer, list(sample.prompt), sampler, Detokenizer(self._tokenizer, sample.prompt))

    def _run(self, rows: list[Row]) -> Iterator[Chunk]:
        """Generate until every row has finished; where memory runs out, half of them first."""
        try:
            yield from self._run_together(rows)
        except LLMOutOfMemoryError as error:
            memory.empty_caches()
            left = [row for row in rows if not row.answer.finished]
            if len(left) == 1:
                self._most = self.slots  # it was this row
                yield left[0].answer.fail(
                    f"{error} for this row alone: use a smaller sampling.max_tokens or backend.context"
                )
                return
            self.shrinks += 1
            self._batches_since = 0
            self._most = half = max(1, len(left) // 2)
            log.warning("%s: going on with batches of %d rows", error, half)
            # Their caches are gone, their tokens are not: those are computed once more.
            for start in range(0, len(left), half):
                yield from self._run(left[start : start + half])

    def _grow(self) -> None:
        """Try twice the rows again, once enough batches have gone well since memory ran out."""
        self._batches_since += 1
        if self._most < self.slots and self._batches_since >= PATIENCE * 2 ** min(self.shrinks, 5):
            self._batches_since = 0
            self._most = min(self.slots, self._most * 2)

    def _run_together(self, rows: list[Row]) -> Iterator[Chunk]:
        """Generate for one batch until every row has finished."""
        ids, mask = self._pad(rows)
        cache = DynamicCache(config=self._model.config)
        while True:
            self._tick()
            is_prefill = ids.shape[1] > 1
            tokens = sum(len(row.tokens) for row in rows) if is_prefill else len(rows)
            with self.throughput.step(tokens, is_prefill):
                logits = self._forward(ids, mask, cache)
                chosen = self._choose(rows, logits)
            chunks = [self._add(row, token) for row, token in chosen]
            yield from (chunk for chunk in chunks if chunk is not None)
            keep = [i for i, row in enumerate(rows) if not row.answer.finished]
            if not keep:
                return
            if len(keep) <= len(rows) // 2:  # copying the cache pays once half of it is of no more use
                index = torch.tensor(keep, device=mask.device)
                cache.reorder_cache(index)  # unlike batch_select_indices, recurrent layers have it too
                mask = mask[index]
                rows = [rows[i] for i in keep]
            ids = torch.tensor([[row.tokens[-1]] for row in rows], device=mask.device)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)

    def _pad(self, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask, each (rows, most tokens), padded on the left; what the padding is does not matter."""
        width = max(len(row.tokens) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row.tokens) :] = torch.tensor(row.tokens)
            mask[i, width - len(row.tokens) :] = 1
        device = memory.input_device(self._model)
        return ids.to(device), mask.to(device)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Return the logits after the last token, (rows, vocabulary), float32."""
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask,
            self._cache_name: cache,
            "use_cache": True,
        }
        if self._is_recurrent and mask.shape[1] > ids.shape[1]:
            del inputs["attention_mask"]  # its padding is in the state already, and it would apply it to the new token
        if self._takes_positions:
            # Clamped for padding below, and above for rows that have finished at the context's end.
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(0, self.limit - 1)[:, -ids.shape[1] :]
        if self._takes_logits_to_keep:
            inputs["logits_to_keep"] = 1
        with memory.failures_of(self._model):
            logits: torch.Tensor = self._model(**inputs).logits
        return logits[:, -1].float()

    def _choose(self, rows: list[Row], logits: torch.Tensor) -> list[tuple[Row, int]]:
        """Choose a token for every unfinished row."""
        going_on = [i for i, row in enumerate(rows) if not row.answer.finished]
        with memory.failures_of(self._model):
            some = logits if len(going_on) == len(rows) else logits[torch.tensor(going_on, device=logits.device)]
            tokens = choose(some, [rows[i].sampler for i in going_on])
        return [(rows[i], token) for i, token in zip(going_on, tokens, strict=True)]

    def _add(self, row: Row, token: int) -> Chunk | None:
        """Add a token to its row; return the chunk it completes, if any."""
        if row.answer.request.id in self.cancelled:
            return row.answer.fail("cancelled")
        if token < 0:
            return row.answer.fail(NO_NUMBERS)
        if row.answer.ends_at(token, token in self._end_tokens):
            return row.answer.end()
        row.tokens.append(token)
        return row.answer.add(row.text.push(token))

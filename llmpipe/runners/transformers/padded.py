"""Padded batches: rows of similar length go through the model together, and leave as they finish.

A batch is left-padded, with masked padding and positions counted from each row's first token, so that a row's answer
is what it would be alone. Knows nothing of files or of how the model was loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import DynamicCache

from llmpipe.exceptions import LLMInferenceError
from llmpipe.records import Chunk, Request
from llmpipe.runners.base import error_chunks
from llmpipe.runners.decoding import Answer
from llmpipe.runners.transformers.sampler import Sampler
from llmpipe.runners.transformers.text import TokenText

LOOK_AHEAD = 4
"""Batches' worth of rows that are pulled at once and sorted by prompt length, so that little is padding."""

Encode = Callable[[Request], tuple[list[int], int]]
"""Request → the prompt's tokens and how many were cut off on the left; a ValueError makes an error row."""


@dataclass
class Row:
    """One sample in flight: everything about it, in one place."""

    answer: Answer
    prompt: list[int]
    sampler: Sampler
    text: TokenText
    next_token: int = 0


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
        self._slots = slots
        self._context = context
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_logits_to_keep = "logits_to_keep" in parameters

    def stream(self, requests: Iterable[Request], encode: Encode) -> Iterator[Chunk]:
        """Answer `requests`; see `BaseLLMRunner.stream`."""
        source = iter(requests)
        while window := list(islice(source, self._slots * LOOK_AHEAD)):
            samples: list[tuple[Request, int, list[int], int]] = []
            for request in window:
                try:
                    prompt, truncated = encode(request)
                except ValueError as error:
                    yield from error_chunks(request, str(error))
                    continue
                samples.extend((request, sample, prompt, truncated) for sample in request.samples)
            samples.sort(key=lambda item: len(item[2]), reverse=True)
            for start in range(0, len(samples), self._slots):
                rows = [self._row(*item) for item in samples[start : start + self._slots]]
                yield from self._run(rows)

    def _row(self, request: Request, sample: int, prompt: list[int], truncated: int) -> Row:
        answer = Answer(request, sample, len(prompt), truncated, self._context)
        sampler = Sampler(request.sampling, request.seed_of(sample), prompt)
        return Row(answer, prompt, sampler, TokenText(self._tokenizer, prompt))

    def _run(self, rows: list[Row]) -> Iterator[Chunk]:
        """Generate for one batch until every row has finished."""
        ids, mask = self._pad(rows)
        cache = DynamicCache(config=self._model.config)
        while True:
            logits = self._forward(ids, mask, cache)
            yield from self._take(rows, logits)
            keep = [i for i, row in enumerate(rows) if not row.answer.finished]
            if not keep:
                return
            if len(keep) <= len(rows) // 2:  # copying the cache pays once half of it is of no more use
                index = torch.tensor(keep, device=mask.device)
                cache.batch_select_indices(index)
                mask = mask[index]
                rows = [rows[i] for i in keep]
            ids = torch.tensor([[row.next_token] for row in rows], device=mask.device)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)

    def _pad(self, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask, each (rows, longest prompt), padded on the left; what the padding is does not matter."""
        width = max(len(row.prompt) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row.prompt) :] = torch.tensor(row.prompt)
            mask[i, width - len(row.prompt) :] = 1
        return ids.to(self._model.device), mask.to(self._model.device)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Return the logits after the last token, (rows, vocabulary), float32."""
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask,
            "past_key_values": cache,
            "use_cache": True,
        }
        if self._takes_positions:
            # Clamped for padding below, and above for rows that have finished at the context's end.
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(0, self._context - 1)[:, -ids.shape[1] :]
        if self._takes_logits_to_keep:
            inputs["logits_to_keep"] = 1
        try:
            logits: torch.Tensor = self._model(**inputs).logits
        except torch.OutOfMemoryError as error:
            raise LLMInferenceError(
                f"out of memory on {self._model.device} with {len(ids)} rows of {mask.shape[1]} tokens: "
                f"use a smaller backend.slots or backend.context"
            ) from error
        except RuntimeError as error:
            raise LLMInferenceError(f"the model fails: {' '.join(str(error).split())}") from error
        return logits[:, -1].float()

    def _take(self, rows: list[Row], logits: torch.Tensor) -> Iterator[Chunk]:
        """Choose a token for every unfinished row and yield the chunks they complete."""
        best, broken = logits.argmax(-1).tolist(), logits.isnan().any(-1).tolist()
        for i, row in enumerate(rows):
            if row.answer.finished:
                continue
            if broken[i]:
                yield row.answer.fail("the model computed NaN instead of logits; try dtype=float32")
                continue
            try:
                token = best[i] if row.sampler.is_plain_greedy else row.sampler.sample(logits[i])
            except ValueError as error:
                yield row.answer.fail(str(error))
                continue
            chunk = self._add(row, token)
            if chunk is not None:
                yield chunk

    def _add(self, row: Row, token: int) -> Chunk | None:
        """Add a token to its row; return the chunk it completes, if any."""
        if token in self._end_tokens and not row.answer.request.sampling.ignore_eos:
            return row.answer.end()
        row.next_token = token
        return row.answer.add(row.text.push(token))

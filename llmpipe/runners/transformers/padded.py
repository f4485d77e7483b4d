"""Padded batches: the path for models whose attention cannot be replaced. Rows go through the model together.

A batch is left-padded, with masked padding and positions counted from each row's first token, so that a row's answer
is what it would be alone. Rows begin together and leave as they finish; the next ones begin when all have left. What
the engine asks of it is in `batching.executor`: the batch that it gives is packed, and padded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from llmpipe.config import Batching, TransformersConfig
from llmpipe.runners.batching import Sample, Sizes
from llmpipe.runners.transformers import memory
from llmpipe.runners.transformers.context import ModelContext
from llmpipe.runners.transformers.executor import ModelExecutor

SLOTS = 16
"""Rows per batch where that is not set by hand."""
GONE = -1


def ideal_sizes(config: TransformersConfig) -> Sizes:
    """Return the rows of a batch; of its tokens, the least."""
    return Sizes(SLOTS if config.slots == "auto" else int(config.slots), prefixes=0, context=1, batch_tokens=0)


def choose_sizes(config: TransformersConfig, waiting: Sequence[Sample]) -> Sizes:
    """Return the sizes of a batch of the samples that wait, each as long as the longest can become."""
    ideal = ideal_sizes(config)
    return replace(ideal, slots=min(ideal.slots, len(waiting)), context=max(sample.need for sample in waiting))


class PaddedContext(ModelContext):
    """Rows that begin together; see `Context` in `batching.executor`.

    Args:
        model: The model, in eval mode.
        sizes: Its sizes.
        positions: How many positions the model has.
    """

    def __init__(self, model: Any, sizes: Sizes, positions: int) -> None:
        super().__init__(model, sizes, sizes.slots * sizes.context)
        self._positions = positions
        # Purely recurrent models, such as Mamba, call their cache by another name.
        self._is_recurrent = "cache_params" in self._parameters
        self._slots: list[int] = []
        """Which slot each row of cache and mask belongs to; `GONE` where it has left."""
        self._cache: DynamicCache
        self._mask: torch.Tensor
        """Which tokens of the cache are no padding, (rows, tokens)."""

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def compute(self) -> None:
        """Compute whole prompts where no row is in flight, else one token for each row that is.

        Raises:
            LLMOutOfMemoryError: there is too little memory.
            LLMInferenceError: the model fails.
        """
        with memory.failures_of(self._model):
            ids = self._extend() if self._slots else self._begin()
            logits = self._forward(ids)
            slots = self.batch.slots[: self.batch.size][self.batch.output_indices].tolist()
            self.logits = logits if slots == self._slots else logits[[self._slots.index(slot) for slot in slots]]

    def _begin(self) -> torch.Tensor:
        """Return the tokens of whole prompts, (rows, most tokens), padded on the left with whatever it is."""
        batch = self.batch
        tokens = torch.from_numpy(batch.tokens[: batch.size].astype(np.int64))
        firsts = np.flatnonzero(batch.positions[: batch.size] == 0)
        lengths = np.diff(firsts, append=batch.size).tolist()
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (own, length) in enumerate(zip(tokens.split(lengths), lengths, strict=True)):
            ids[row, -length:] = own
            mask[row, -length:] = 1
        self._slots = batch.slots[firsts].tolist()
        self._cache = DynamicCache(config=self._model.config)
        device = memory.input_device(self._model)
        self._mask = mask.to(device)
        return ids.to(device)

    def _extend(self) -> torch.Tensor:
        """Return the next token of each row, (rows, 1); for rows that have left, any token."""
        left = [row for row, slot in enumerate(self._slots) if slot != GONE]
        if len(left) <= len(self._slots) // 2:  # copying the cache pays once half of it is of no more use
            index = torch.tensor(left, device=self._mask.device)
            self._cache.reorder_cache(index)  # unlike batch_select_indices, recurrent layers have it too
            self._mask = self._mask[index]
            self._slots = [self._slots[row] for row in left]
        batch = self.batch
        tokens = dict(zip(batch.slots[: batch.size].tolist(), batch.tokens[: batch.size].tolist(), strict=True))
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._slots), 1)], dim=1)
        return torch.tensor([[tokens.get(slot, 0)] for slot in self._slots], device=self._mask.device)

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits after the last token, (rows, vocabulary), float32."""
        mask = self._mask
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask,
            "cache_params" if self._is_recurrent else "past_key_values": self._cache,
            "use_cache": True,
        }
        if self._is_recurrent and mask.shape[1] > ids.shape[1]:
            del inputs["attention_mask"]  # its padding is in the state already, and it would apply it to the new token
        if "position_ids" in self._parameters:
            # Clamped for padding below, and above for rows that have finished at the context's end.
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(0, self._positions - 1)[:, -ids.shape[1] :]
        if "logits_to_keep" in self._parameters:
            inputs["logits_to_keep"] = 1
        logits: torch.Tensor = self._model(**inputs).logits
        return logits[:, -1].float()

    def copy(self, source: int, target: int) -> None:
        """Refuse: rows that begin together share nothing, and stay where they are."""
        raise NotImplementedError

    def forget(self, slot: int) -> None:
        """Empty a slot."""
        self._slots = [GONE if other == slot else other for other in self._slots]
        if all(other == GONE for other in self._slots):
            self._empty()

    def close(self) -> None:
        """Free the memory."""
        self._empty()
        memory.empty_caches()

    def _empty(self) -> None:
        self._slots = []
        self._cache = DynamicCache()
        self.logits = torch.empty(0)


class PaddedExecutor(ModelExecutor):
    """Computes in padded batches; see `Executor` in `batching.executor`.

    Args:
        model: The model, in eval mode.
        tokenizer: Its tokenizer.
        end_tokens: Ids that end a generation.
        config: Sizes.
        positions: How many positions the model has.
    """

    batching = Batching.padded
    is_static = True

    def __init__(
        self, model: Any, tokenizer: Any, end_tokens: set[int], config: TransformersConfig, positions: int
    ) -> None:
        super().__init__(model, tokenizer, end_tokens, config)
        self._positions = positions

    @property
    def ideal(self) -> Sizes:
        """The rows of a batch."""
        return ideal_sizes(self._config)

    def sizes(self, waiting: Sequence[Sample], limit: int, held_tokens: int = 0, is_live: bool = False) -> Sizes:
        """Choose the sizes of a batch; its memory is not known before it is used."""
        return choose_sizes(self._config, waiting)

    def context(self, sizes: Sizes) -> PaddedContext:
        """Make a context; its memory is taken when it is used."""
        return PaddedContext(self._model, sizes, self._positions)

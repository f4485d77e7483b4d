"""Slots of a model of transformers: a key-value cache each, packed forward passes, logits. Knows no scheduling."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llmpipe.runners.batching import Batch, Sizes
from llmpipe.runners.transformers import memory
from llmpipe.runners.transformers.attention import KeyValueCache, Step, Style, running
from llmpipe.runners.transformers.sampler import Sampler, choose


class ModelContext:
    """What slots and padded batches share: a batch, the logits it gives, and the tokens chosen from them.

    Args:
        model: The model, in eval mode.
        sizes: Its sizes.
        capacity: Most tokens per call.
    """

    def __init__(self, model: Any, sizes: Sizes, capacity: int) -> None:
        self.sizes = sizes
        self.batch = Batch(capacity)
        self.logits = torch.empty(0)
        """Logits of the last call's outputs: (outputs, vocabulary), float32."""
        self._model = model
        self._parameters = inspect.signature(model.forward).parameters
        """The names that the model's forward pass takes."""

    def sample(self, samplers: Sequence[Sampler]) -> list[int]:
        """Choose a token for each of the batch's outputs, in order; see `sampler.choose`."""
        with memory.failures_of(self._model):
            tokens: list[int] = choose(self.logits, samplers)
        return tokens


class SlotContext(ModelContext):
    """Slots with a key-value cache each; see `Context` in `batching.executor`."""

    def __init__(self, model: Any, sizes: Sizes) -> None:
        super().__init__(model, sizes, max(sizes.batch_tokens, sizes.slots))
        self.styles: dict[int, Style] = {}
        """What each layer wanted of attention in the last call."""
        self._takes_logits_to_keep = "logits_to_keep" in self._parameters
        self._cache = KeyValueCache(sizes.slots + sizes.prefixes, sizes.context)
        self._lengths = np.zeros(sizes.slots + sizes.prefixes, np.int64)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def compute(self) -> None:
        """Compute the batch in one forward pass, its rows packed to one sequence.

        Raises:
            LLMOutOfMemoryError: there is too little memory.
            LLMInferenceError: the model fails.
        """
        batch, device = self.batch, memory.input_device(self._model)
        step = Step(batch, self._cache)
        outputs = torch.from_numpy(batch.output_indices).to(device)
        inputs: dict[str, Any] = {
            "input_ids": torch.from_numpy(batch.tokens[: batch.size].astype(np.int64))[None].to(device),
            "position_ids": torch.from_numpy(batch.positions[: batch.size].astype(np.int64))[None].to(device),
            "use_cache": False,
        }
        if self._takes_logits_to_keep:
            inputs["logits_to_keep"] = outputs
        with memory.failures_of(self._model), running(step):
            logits = self._model(**inputs).logits[0]
            self.logits = (logits if self._takes_logits_to_keep else logits[outputs.to(logits.device)]).float()
        # Of a slot's tokens the last one counts: numpy assigns in order.
        self._lengths[batch.slots[: batch.size]] = batch.positions[: batch.size] + 1
        self.styles = step.styles

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def copy(self, source: int, target: int) -> None:
        """Make `target` what `source` is."""
        self._cache.copy(source, target, self._lengths[source])
        self._lengths[target] = self._lengths[source]

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def forget(self, slot: int) -> None:
        """Empty a slot."""
        self._cache.clear(slot, self._lengths[slot])
        self._lengths[slot] = 0

    def close(self) -> None:
        """Free the memory."""
        del self._cache
        self.logits = torch.empty(0)
        memory.empty_caches()

    @property
    def bytes_per_token(self) -> int:
        """Bytes of cache that a token takes."""
        return self._cache.bytes_per_token

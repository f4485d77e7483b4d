"""What the engine asks of a backend. The engine decides who is computed when; an executor computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmpipe.runners.batching.lookahead import Sample
from llmpipe.runners.batching.sizing import Sizes

NO_NUMBERS = "the model computed NaN instead of logits: try a wider number format, or milder penalties"
"""Why a row ends whose next token cannot be chosen: a logit is NaN or infinite, or all are minus infinity."""


class Batch:
    """The tokens of one call: which token, at which position of which slot, and whether its logits are wanted."""

    def __init__(self, capacity: int) -> None:
        self.tokens = np.zeros(capacity, np.int32)
        self.positions = np.zeros(capacity, np.int32)
        self.slots = np.zeros(capacity, np.int32)
        self.outputs = np.zeros(capacity, np.int8)
        self.capacity = capacity
        self.size = 0

    @property
    def room(self) -> int:
        """Tokens that can still be added."""
        return self.capacity - self.size

    @property
    def output_indices(self) -> npt.NDArray[np.intp]:
        """Indices in the batch of the tokens whose logits are wanted."""
        return np.flatnonzero(self.outputs[: self.size])

    def clear(self) -> None:
        """Begin a new call."""
        self.size = 0

    def add(self, tokens: Sequence[int], position: int, slot: int, output_last: bool) -> int:
        """Append successive tokens of one slot, as many as there is room for, and return how many those are.

        Logits are computed for the last of `tokens`, where that is asked for and there was room for it.
        """
        count = min(len(tokens), self.room)
        span = slice(self.size, self.size + count)
        self.tokens[span] = tokens[:count]
        self.positions[span] = np.arange(position, position + count)
        self.slots[span] = slot
        self.outputs[span] = 0
        self.outputs[span.stop - 1] = output_last and count == len(tokens)
        self.size = span.stop
        return count

    def set_columns(self, tokens: list[int], positions: list[int], slots: list[int]) -> None:
        """Fill the batch with one token per slot, with logits for each."""
        self.size = len(tokens)
        self.tokens[: self.size] = tokens
        self.positions[: self.size] = positions
        self.slots[: self.size] = slots
        self.outputs[: self.size] = 1


class Context(Protocol):
    """Slots with a cache each, computed together."""

    @property
    def sizes(self) -> Sizes:
        """Its sizes."""

    @property
    def batch(self) -> Batch:
        """What the next call computes."""

    def compute(self) -> None:
        """Compute the batch.

        Raises:
            LLMOutOfMemoryError: there is too little memory for it; the context is still good.
            LLMInferenceError: the backend failed.
        """

    def sample(self, samplers: Sequence[Any]) -> list[int]:
        """Choose a token for each of the batch's outputs, in order; -1 where its logits are no numbers.

        Args:
            samplers: One for each output, but for the last where that was only company.

        Raises:
            LLMOutOfMemoryError: there is too little memory for it; no sampler has drawn anything.
        """

    def copy(self, source: int, target: int) -> None:
        """Make the slot `target` what `source` is."""

    def forget(self, slot: int) -> None:
        """Empty a slot."""

    def close(self) -> None:
        """Free the memory; the context cannot be used afterwards."""


class Sampler(Protocol):
    """How a context chooses the tokens of one completion, with a random stream of its own."""

    def close(self) -> None:
        """Free what it holds."""


class Detokenizer(Protocol):
    """Turns the tokens of one completion into text as they come."""

    def push(self, token: int) -> str:
        """Return the characters that `token` completes."""


class Executor(Protocol):
    """A loaded model."""

    @property
    def ideal(self) -> Sizes:
        """The sizes that pay, before the rows and the memory are known; of the context, the least."""

    @property
    def is_static(self) -> bool:
        """Whether rows can only begin together, in an empty context that takes their whole prompts in one call."""

    @property
    def never_alone(self) -> bool:
        """Whether a row that is decoded by itself gets other digits than beside others, and so needs company."""

    @property
    def keeps_nan(self) -> bool:
        """Whether a NaN stays where it was after its row has left, and gets into whoever comes there next.

        As it does where zero times what is there is added to a sum, or where a state is multiplied by zero to empty it.
        """

    def sizes(self, waiting: Sequence[Sample], limit: int, held_tokens: int = 0, is_live: bool = False) -> Sizes:
        """Choose the sizes of a context for the samples that wait, at least one.

        Args:
            waiting: The samples.
            limit: Most tokens a row may have.
            held_tokens: Tokens of the cache there is now, which makes room for the new one.
            is_live: Whether more may come at any time.
        """

    def context(self, sizes: Sizes) -> Context:
        """Make a context; where that is static, its batch has room for the whole prompts.

        Raises:
            LLMInitializationError: the backend cannot, for want of memory or of a feature.
        """

    def used_device_bytes(self) -> int:
        """Return the device memory in use; 0 where the model runs on the host."""

    def sampler(self, sample: Sample) -> Sampler:
        """Return how the sample's tokens are chosen."""

    def detokenizer(self, sample: Sample) -> Detokenizer:
        """Return what turns the sample's tokens into text."""

    def is_end(self, token: int) -> bool:
        """Say whether `token` ends a generation."""

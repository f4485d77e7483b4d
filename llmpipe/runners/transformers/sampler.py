"""`SamplingConfig` → transformers' own logits processors, and a draw from a random stream of the row's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from llmpipe.config import SamplingConfig

if TYPE_CHECKING:
    from llmpipe.runners.transformers.executor import SlotContext


class Sampler:
    """Chooses the tokens of one completion, in the order that `SamplingConfig` states.

    Args:
        sampling: The options.
        seed: Seed of the completion's random stream.
        prompt: The prompt's tokens; the repetition penalty counts them, the other penalties do not.
    """

    def __init__(self, sampling: SamplingConfig, seed: int, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        self._tokens = list(prompt)
        self._counts: Counter[int] = Counter()
        # On the CPU whatever the model's device, so that a seed means the same everywhere.
        self._generator = torch.Generator().manual_seed(seed)
        self._repetition = (
            RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty) if sampling.repetition_penalty != 1 else None
        )
        self._warpers = LogitsProcessorList()
        if sampling.temperature != 1 and not sampling.is_greedy:
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(sampling.top_p)))
        if sampling.min_p > 0:
            self._warpers.append(MinPLogitsWarper(float(sampling.min_p)))
        if sampling.typical_p < 1:
            self._warpers.append(TypicalLogitsWarper(float(sampling.typical_p)))

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is simply the one with the largest logit."""
        s = self._sampling
        penalties = self._repetition or s.presence_penalty or s.frequency_penalty
        return s.is_greedy and not penalties and not s.logit_bias

    def sample(self, context: SlotContext, output: int) -> int:
        """Draw a token from one of the outputs of a context's last call; see `draw`."""
        return self.draw(context.logits[output])

    def draw(self, logits: torch.Tensor) -> int:
        """Draw a token, or return -1 where the logits are no numbers, as after an overflow in the model.

        Args:
            logits: Shape (vocabulary,), float32, on any device; not changed.
        """
        s = self._sampling
        scores = logits.detach().cpu().clone().unsqueeze(0)
        if s.logit_bias:
            ids = torch.tensor(list(s.logit_bias))
            scores[0, ids] += torch.tensor(list(s.logit_bias.values()))
        if self._repetition is not None:
            scores = self._repetition(torch.tensor([self._tokens]), scores)
        if self._counts and (s.presence_penalty or s.frequency_penalty):
            ids = torch.tensor(list(self._counts))
            counts = torch.tensor(list(self._counts.values()), dtype=scores.dtype)
            scores[0, ids] -= s.presence_penalty + s.frequency_penalty * counts
        weights = scores[0] if s.is_greedy else self._warpers(None, scores)[0].softmax(-1)
        if weights.isnan().any():
            return -1
        token = int(weights.argmax() if s.is_greedy else torch.multinomial(weights, 1, generator=self._generator))
        self._tokens.append(token)
        self._counts[token] += 1
        return token

    def close(self) -> None:
        """Hold nothing: there is nothing to free."""

"""`SamplingConfig` → a chain of llama.cpp's own samplers, with a random stream of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llama_cpp

from llmpipe.config import SamplingConfig
from llmpipe.runners.llama_cpp.context import LlamaContext
from llmpipe.runners.llama_cpp.model import Model

MIN_KEEP = 1


def is_plain_greedy(sampling: SamplingConfig) -> bool:
    """Say whether the next token is simply the one with the largest logit, so that no chain is needed."""
    return (
        sampling.is_greedy
        and not sampling.logit_bias
        and sampling.repetition_penalty == 1
        and sampling.presence_penalty == 0
        and sampling.frequency_penalty == 0
    )


class Sampler:
    """The samplers of one completion, in the order that `SamplingConfig` states.

    Args:
        sampling: The options.
        seed: Seed of the completion's random stream.
        model: Gives the size of the vocabulary.
        prompt: The prompt's tokens; the repetition penalty counts them, the other penalties do not.
        room: Most tokens that prompt and completion can have.
    """

    def __init__(self, sampling: SamplingConfig, seed: int, model: Model, prompt: Sequence[int], room: int) -> None:
        self._chain: Any = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        n = model.n_vocab
        if sampling.logit_bias:
            bias = (llama_cpp.llama_logit_bias * len(sampling.logit_bias))(*sampling.logit_bias.items())
            self._add(llama_cpp.llama_sampler_init_logit_bias(n, len(bias), bias))
        if sampling.repetition_penalty != 1:
            repetition = llama_cpp.llama_sampler_init_penalties(n, room, sampling.repetition_penalty, 0.0, 0.0)
            for token in prompt:
                llama_cpp.llama_sampler_accept(repetition, token)
            self._add(repetition)
        if sampling.frequency_penalty or sampling.presence_penalty:
            self._add(
                llama_cpp.llama_sampler_init_penalties(
                    n, room, 1.0, sampling.frequency_penalty, sampling.presence_penalty
                )
            )
        if sampling.is_greedy:
            self._add(llama_cpp.llama_sampler_init_greedy())
            return
        if sampling.temperature != 1:
            self._add(llama_cpp.llama_sampler_init_temp(sampling.temperature))
        if sampling.top_k:
            self._add(llama_cpp.llama_sampler_init_top_k(sampling.top_k))
        if sampling.top_p < 1:
            self._add(llama_cpp.llama_sampler_init_top_p(sampling.top_p, MIN_KEEP))
        if sampling.min_p > 0:
            self._add(llama_cpp.llama_sampler_init_min_p(sampling.min_p, MIN_KEEP))
        if sampling.typical_p < 1:
            self._add(llama_cpp.llama_sampler_init_typical(sampling.typical_p, MIN_KEEP))
        # Its generator takes 32 bits; the last such number would mean a seed from the clock.
        self._add(llama_cpp.llama_sampler_init_dist(seed % llama_cpp.LLAMA_DEFAULT_SEED))

    def sample(self, context: LlamaContext, output: int) -> int:
        """Draw a token from one of the outputs of the last decode call, and remember it for the penalties."""
        index = int(context.batch.output_indices[output])
        return int(llama_cpp.llama_sampler_sample(self._chain, context.handle, index))

    def close(self) -> None:
        """Free the chain; it owns its samplers."""
        if self._chain:
            llama_cpp.llama_sampler_free(self._chain)
            self._chain = None

    def _add(self, sampler: Any) -> None:
        llama_cpp.llama_sampler_chain_add(self._chain, sampler)

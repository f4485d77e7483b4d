"""`SamplingConfig` → a chain of llama.cpp's own samplers, with a random stream of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

from llmpipe.config import SamplingConfig
from llmpipe.runners.llama_cpp.model import Model

OPTIONS = frozenset({"logit_bias", "repetition_penalty", "presence_penalty", "frequency_penalty", "temperature"})
OPTIONS |= {"top_k", "top_p", "min_p", "typical_p"}
"""Sampling options that a chain honours."""
MIN_KEEP = 1


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
        penalties = sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
        self._most = float(np.finfo(np.float32).max) * min(sampling.repetition_penalty, 1)
        """The largest logit that no penalty makes infinite."""
        self._chain: Any = None
        """None where the next token is simply the one with the largest logit."""
        if sampling.is_greedy and not sampling.logit_bias and not penalties:
            return
        self._chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
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

    def sample(self, context: Any, index: int, best: int) -> int:
        """Choose a token, and remember it for the penalties; return -1 where these make a logit infinite.

        Args:
            context: llama.cpp's pointer to the context that has just computed.
            index: Which token of its batch the logits belong to.
            best: The token with the largest logit.
        """
        if self._chain is None:
            return best
        if llama_cpp.llama_get_logits_ith(context, index)[best] > self._most:
            return -1
        return int(llama_cpp.llama_sampler_sample(self._chain, context, index))

    def close(self) -> None:
        """Free the chain; it owns its samplers."""
        if self._chain:
            llama_cpp.llama_sampler_free(self._chain)
            self._chain = None

    def _add(self, sampler: Any) -> None:
        llama_cpp.llama_sampler_chain_add(self._chain, sampler)

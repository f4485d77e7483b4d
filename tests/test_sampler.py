"""Sampling on the transformers backend: all rows at once, as each would be alone, by transformers' own definitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from llmpipe import SamplingConfig
from llmpipe.runners.transformers import sampler as module
from llmpipe.runners.transformers.sampler import FEW, Sampler, candidates, choose

VOCABULARY = 40
WARPERS: dict[str, Any] = {
    "top_k": hf.TopKLogitsWarper,
    "top_p": hf.TopPLogitsWarper,
    "min_p": hf.MinPLogitsWarper,
    "typical_p": hf.TypicalLogitsWarper,
}
"""In the order in which they are applied."""
SAMPLINGS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.5, 1.0, 3.0])},
    optional={
        "top_k": st.integers(1, 50),
        "top_p": st.sampled_from([0.05, 0.5, 0.9, 0.999]),
        "min_p": st.sampled_from([0.01, 0.2, 1.0]),
        "typical_p": st.sampled_from([0.1, 0.5, 0.95]),
        "repetition_penalty": st.sampled_from([0.7, 1.5]),
        "presence_penalty": st.sampled_from([-1.0, 1.5]),
        "frequency_penalty": st.sampled_from([-0.5, 0.75]),
        "logit_bias": st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-3, 3), max_size=3),
    },
)


def logits_of(seed: int, step: int, size: int = VOCABULARY, spread: float = 3.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([seed, step]).normal(0, spread, size)).float()


def generate(samplings: Sequence[dict[str, Any]], steps: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return the tokens of rows that are computed together in some steps each, from logits and seeds of their own.

    Args:
        samplings: Of the rows.
        steps: The first and the last step of each.
    """
    samplers = [Sampler(SamplingConfig(**sampling), i, [i, 3, 3]) for i, sampling in enumerate(samplings)]
    made: list[list[int]] = [[] for _ in samplers]
    for step in range(max(last for _, last in steps) + 1):
        rows = [i for i, (first, last) in enumerate(steps) if first <= step <= last]
        if rows:
            logits = torch.stack([logits_of(i, step) for i in rows])
            for i, token in zip(rows, choose(logits, [samplers[i] for i in rows]), strict=True):
                made[i].append(token)
    return made


def generate_alone(sampling: dict[str, Any], row: int, first: int, last: int) -> list[int]:
    sampler = Sampler(SamplingConfig(**sampling), row, [row, 3, 3])
    return [choose(logits_of(row, step)[None], [sampler])[0] for step in range(first, last + 1)]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(SAMPLINGS, min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(3, 6)), min_size=8, max_size=12),
)
def test_a_row_gets_among_others_what_it_gets_alone(kinds: list[dict[str, Any]], steps: list[tuple[int, int]]) -> None:
    samplings = [kinds[i % len(kinds)] for i in range(len(steps))]
    alone = [generate_alone(sampling, i, *steps[i]) for i, sampling in enumerate(samplings)]
    assert generate(samplings, steps) == alone


@settings(max_examples=100, deadline=None)
@given(SAMPLINGS, st.integers(0, 1000))
def test_bias_and_penalties_are_what_the_options_say(sampling: dict[str, Any], seed: int) -> None:
    s = SamplingConfig(**{**sampling, "temperature": 0.0})
    sampler, prompt = Sampler(s, 0, [1, 2, 2]), [1, 2, 2]
    completion: list[int] = []
    for step in range(8):
        logits = logits_of(seed, step, spread=1.0)
        scores = logits.double().numpy()
        for token in range(VOCABULARY):
            scores[token] += s.logit_bias.get(token, 0)
            if token in prompt + completion:
                scores[token] *= s.repetition_penalty if scores[token] < 0 else 1 / s.repetition_penalty
            if token in completion:
                scores[token] -= s.presence_penalty + s.frequency_penalty * completion.count(token)
        (token,) = choose(logits[None], [sampler])
        assert scores[token] >= scores.max() - 1e-5
        completion.append(token)


@settings(max_examples=150, deadline=None)
@given(SAMPLINGS, st.integers(0, 1000), st.sampled_from([5, FEW]))
def test_the_tokens_left_and_their_likelihoods_are_those_of_transformers(
    sampling: dict[str, Any], seed: int, most: int
) -> None:
    s = SamplingConfig(**sampling)
    scores = torch.stack([logits_of(seed, i, spread=spread) for i, spread in enumerate((0.3, 1.0, 4.0))])
    expected = scores
    for name, warper in WARPERS.items():
        if name in sampling:
            expected = warper(getattr(s, name))(None, expected)
    weights, ids, short = candidates(scores, s, most)
    if short is not None and short.any():
        assert most < VOCABULARY
        weights, ids, _ = candidates(scores, s, VOCABULARY)
    found = torch.zeros_like(scores).scatter_(
        1, ids if ids is not None else torch.arange(VOCABULARY)[None].expand(3, -1), weights
    )
    assert torch.allclose(found / found.sum(-1, keepdim=True), expected.softmax(-1), atol=1e-5)


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.97}, {"typical_p": 0.97}, {"top_p": 0.99, "typical_p": 0.98}])
@pytest.mark.parametrize("size", [30, 3 * FEW])
def test_draws_follow_the_distribution_also_where_many_tokens_are_likely(sampling: dict[str, Any], size: int) -> None:
    n = 20_000
    s = SamplingConfig(temperature=1.0, **sampling)
    logits = logits_of(1, 1, size, spread=0.7)
    weights, ids, _ = candidates(logits[None], s, size)
    p = torch.zeros(1, size).scatter_(1, ids if ids is not None else torch.arange(size)[None], weights)[0].double()
    p /= p.sum()
    tokens = choose(logits.expand(n, -1), [Sampler(s, seed, []) for seed in range(n)])
    counts = torch.bincount(torch.tensor(tokens), minlength=size)
    assert not counts[p == 0].any()
    kept = p > 0
    chi_square = float(((counts - n * p)[kept] ** 2 / (n * p[kept])).sum())
    degrees = int(kept.sum()) - 1
    assert abs(chi_square - degrees) < 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_distribution_are_tokens_that_can_be_drawn(uniform: float) -> None:
    logits = torch.full((1, 50), float("-inf"))
    logits[0, 20:30] = 1.0
    for sampling in ({}, {"top_p": 0.9}, {"top_k": 20}, {"typical_p": 0.9}, {"min_p": 0.5}):
        sampler = Sampler(SamplingConfig(temperature=1.0, **sampling), 0, [])
        sampler.uniform = uniform
        assert 20 <= choose(logits, [sampler])[0] < 30


def test_a_row_gets_the_same_token_when_memory_ran_out_before_it_had_it(monkeypatch: pytest.MonkeyPatch) -> None:
    samplings: list[dict[str, Any]] = [
        {"temperature": 1.0, "repetition_penalty": 1.5},
        {"frequency_penalty": 2.0, "temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9, "presence_penalty": 1.0},
    ]
    steps = [(0, 5)] * 3
    expected = generate(samplings, steps)
    draw, calls = module.draw, []

    def scarce(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) % 3 == 2:
            raise torch.OutOfMemoryError("out of memory")
        return draw(*args)

    monkeypatch.setattr(module, "draw", scarce)
    choose_once = choose

    def patient(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
        while True:
            try:
                return list(choose_once(logits, samplers))
            except torch.OutOfMemoryError:
                pass

    monkeypatch.setitem(globals(), "choose", patient)
    assert generate(samplings, steps) == expected
    assert len(calls) > 2 * 6

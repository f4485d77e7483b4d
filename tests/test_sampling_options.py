"""Every sampling option, on every backend: honoured, and then an answer shows it, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest

from llmpipe import BaseLLMRunner, LLMInferenceError, SamplingConfig
from llmpipe.runners import EchoRunner

BASE = {"temperature": 1.5, "max_tokens": 12}
SHOWN: dict[str, Any] = {
    "temperature": 0.05,
    "top_k": 1,
    "top_p": 0.05,
    "min_p": 0.95,
    "typical_p": 0.05,
    "repetition_penalty": 50.0,
    "presence_penalty": 2.0,
    "frequency_penalty": 2.0,
    "logit_bias": {300: 1e3},
    "max_tokens": 3,
    "stop": ["e", "o"],
    "stop_token_ids": list(range(500)),
    "n": 2,
    "seed": 1,
    "ignore_eos": True,
}
"""For each option a value with which a model answers otherwise than with `BASE`; a new option needs one."""
CERTAIN = {"temperature", "top_k", "top_p", "min_p", "typical_p", "seed"}
CERTAIN |= {"logit_bias", "repetition_penalty", "presence_penalty", "frequency_penalty"}
"""Options that change nothing where each next token is certain."""


class Words(BaseLLMRunner):
    """Someone else's backend, which takes one prompt at a time."""

    def _initialize_model(self) -> None:
        pass

    def _run_streaming(self, prompt: str, max_tokens: int, temperature: float) -> Iterator[str]:
        yield from [f"{word}{temperature} " for word in prompt.split()[:max_tokens]]


@pytest.fixture(params=["llama_cpp", "transformers", "echo", "of someone else"])
def any_runner(request: pytest.FixtureRequest) -> BaseLLMRunner:
    if request.param == "echo":
        return EchoRunner({})
    if request.param == "of someone else":
        return Words({})
    found: BaseLLMRunner = request.getfixturevalue(f"{request.param}_runner")
    return found


@pytest.mark.parametrize("name", [f.name for f in fields(SamplingConfig)])
def test_every_option_is_honoured_or_refused_by_name(name: str, any_runner: BaseLLMRunner) -> None:
    kind, prompt, value = (
        type(any_runner).__name__,
        "to be or not to be, that is the question, or so we are told",
        SHOWN[name],
    )
    if name not in any_runner.honours:
        with pytest.raises(LLMInferenceError, match=f"{kind} cannot honour sampling.{name}="):
            any_runner.generate_text(prompt, **{name: value})
        with pytest.raises(ValueError, match=f"{kind} cannot honour sampling.{name}="):
            any_runner.encode(any_runner.request(prompt, **{name: value}))  # as a plan does
        return
    before, after = ([c.text for c in any_runner.run([prompt], **options)] for options in (BASE, {**BASE, name: value}))
    assert (before == after) == (isinstance(any_runner, EchoRunner) and name in CERTAIN)


def test_no_backend_honours_an_option_that_does_not_exist(any_runner: BaseLLMRunner) -> None:
    assert any_runner.honours <= {f.name for f in fields(SamplingConfig)}

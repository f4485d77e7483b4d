"""Texts to token ids and back, on every backend that has tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpipe import BaseLLMRunner, LLMInferenceError, LLMRunnerFactory


@pytest.fixture(scope="module", params=["llama_cpp", "transformers", "isolated"])
def tokens(request: pytest.FixtureRequest) -> Iterator[BaseLLMRunner]:
    if request.param == "isolated":
        with LLMRunnerFactory.create_runner({"backend": "llama_cpp", "isolation": True, "threads": 1}) as runner:
            yield runner
    else:
        yield request.getfixturevalue(f"{request.param}_runner")


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None, max_examples=60)
def test_any_text_comes_back(text: str, tokens: BaseLLMRunner) -> None:
    assert tokens.detokenize(tokens.tokenize(text)) == text


def test_a_control_token_is_text_unless_it_is_asked_for(tokens: BaseLLMRunner) -> None:
    assert len(tokens.tokenize("<|im_end|>", special=True)) == 1 < len(tokens.tokenize("<|im_end|>"))
    assert tokens.detokenize(tokens.tokenize("a<|im_end|>b", special=True)) == "ab"


def test_a_backend_without_tokens_says_so() -> None:
    runner = LLMRunnerFactory.create_runner({"backend": "echo"})
    with pytest.raises(LLMInferenceError, match="EchoRunner has no tokens"):
        runner.tokenize("a")

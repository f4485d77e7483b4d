"""Texts to token ids and back, on every backend that has tokens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

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


@pytest.mark.parametrize("ids", [[-1], [0, 10**6], [2**40], ["a"], [1.5], [None]])
def test_what_is_no_token_is_refused(ids: Any, tokens: BaseLLMRunner) -> None:
    with pytest.raises((ValueError, LLMInferenceError), match="is not a token; the model has tokens 0 to"):
        tokens.detokenize(ids)
    assert tokens.detokenize([True, *tokens.tokenize("a")]).endswith("a")


def test_tokens_may_be_asked_for_while_the_model_is_loaded_again(runner: BaseLLMRunner) -> None:
    text, done = "Hello world. " * 300, threading.Event()
    ids = runner.tokenize(text)
    found: set[str] = set()

    def ask() -> None:
        while not done.is_set():
            try:
                found.add(runner.detokenize(runner.tokenize(text)))
            except LLMInferenceError as error:
                found.add(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    for _ in range(3):
        runner.reload()
    done.set()
    thread.join()
    assert found <= {text, "this runner is closed: call reload() first"}
    assert runner.tokenize(text) == ids


def test_a_backend_without_tokens_says_so() -> None:
    runner = LLMRunnerFactory.create_runner({"backend": "echo"})
    with pytest.raises(LLMInferenceError, match="EchoRunner has no tokens"):
        runner.tokenize("a")

"""Models and data that others made: what a model of our own cannot show. Skipped where they are not there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmpipe import BaseLLMRunner, LLMRunnerFactory

pytestmark = pytest.mark.real

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA3 = "gemma-3-270m*.gguf"
MAX_TOKENS = 120


@pytest.fixture(scope="module")
def questions(real: Callable[[str], Path]) -> list[list[dict[str, str]]]:
    """GSM8K's first 100 questions, each as a chat."""
    lines = real("gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()[:100]
    return [[{"role": "user", "content": json.loads(line)["question"]}] for line in lines]


@pytest.fixture(scope="module", params=["llama_cpp", "transformers"])
def smollm2(request: pytest.FixtureRequest, real: Callable[[str], Path]) -> Iterator[BaseLLMRunner]:
    config = {"backend": request.param, "model_path": str(real(SMOLLM2)), "device": "cpu", "temperature": 0.0}
    with LLMRunnerFactory.create_runner({"llm": config}) as runner:
        yield runner


def answers(runner: BaseLLMRunner, chats: list[Any], max_tokens: int = MAX_TOKENS) -> list[str | None]:
    return [completion.text for completion in runner.run(chats, max_tokens=max_tokens)]


@pytest.mark.slow
def test_reproducible_answers_are_those_of_create_chat_completion(
    real: Callable[[str], Path], questions: list[list[dict[str, str]]]
) -> None:
    from llama_cpp import Llama

    config = {"model_path": str(real(SMOLLM2)), "device": "cpu", "reproducible": True, "temperature": 0.0}
    with LLMRunnerFactory.create_runner({"llm": config}) as runner:
        ours = answers(runner, questions)
    llama = Llama(str(real(SMOLLM2)), n_ctx=1024, verbose=False)
    theirs = [
        llama.create_chat_completion(chat, max_tokens=MAX_TOKENS, temperature=0.0)["choices"][0]["message"]["content"]
        for chat in questions
    ]
    assert [i for i in range(len(theirs)) if ours[i] != theirs[i]] == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["llama_cpp", "transformers"])
def test_reproducible_answers_do_not_depend_on_their_neighbours(
    backend: str, real: Callable[[str], Path], questions: list[list[dict[str, str]]]
) -> None:
    config = {"backend": backend, "model_path": str(real(SMOLLM2)), "device": "cpu", "reproducible": True}
    with LLMRunnerFactory.create_runner({"llm": config}) as runner:
        together = answers(runner, questions, 40)
        assert answers(runner, questions[90:], 40) == together[90:]


def test_a_real_model_knows_a_capital(smollm2: BaseLLMRunner) -> None:
    assert "Paris" in smollm2.generate_text("What is the capital of France?", max_tokens=30)


def test_an_answer_that_was_begun_is_continued(smollm2: BaseLLMRunner) -> None:
    chat = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is the city of Par"},
    ]
    assert smollm2.generate_text(chat, max_tokens=5).startswith("is")


def test_a_model_that_adds_bos_reads_rendered_prompts_alike(real: Callable[[str], Path]) -> None:
    with LLMRunnerFactory.create_runner({"llm": {"model_path": str(real(GEMMA3)), "device": "cpu"}}) as runner:
        turn = "<start_of_turn>user\nName three colours.<end_of_turn>\n<start_of_turn>model\n"
        plain, begun = (runner.request(text, prompt_format="raw") for text in (turn, "<bos>" + turn))
        assert runner.encode(plain) == runner.encode(begun)

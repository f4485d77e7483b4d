"""What stands around a prompt's tokens, once: BOS and its like, on both backends; and tokens that end an answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf_models import write_variant
from strategies import QUESTIONS, STORY

from llmpipe import BaseLLMRunner, LLMConfigError, LLMRunnerFactory, compose
from llmpipe.pipeline import run
from llmpipe.runners.encoding import Around, with_stop_tokens

BOS, END = 0, 2
RENDERED = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def adding_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, whose file asks for BOS before a text."""
    return write_variant(tmp_path_factory.mktemp("model") / "bos.gguf", {"tokenizer.ggml.add_bos_token": True})


@pytest.fixture(scope="module")
def bos_runner(adding_bos: Path) -> Iterator[BaseLLMRunner]:
    config = {"backend": "llama_cpp", "model_path": str(adding_bos), "temperature": 0.0, "threads": 1}
    with LLMRunnerFactory.create_runner(config) as runner:
        yield runner


def ids(runner: BaseLLMRunner, prompt: Any, **options: Any) -> list[int]:
    return list(runner.encode(runner.request(prompt, **options))[0])  # type: ignore[index]


def raw(runner: BaseLLMRunner, text: str, **options: Any) -> list[int]:
    return ids(runner, text, prompt_format="raw", **options)


# --- BOS --------------------------------------------------------------------------------------------------------------


def test_a_prompt_has_one_bos_whether_it_brings_one_or_not(
    bos_runner: BaseLLMRunner, caplog: pytest.LogCaptureFixture
) -> None:
    own = raw(bos_runner, RENDERED, add_bos=False)
    assert BOS not in own
    with caplog.at_level(logging.INFO):
        for text in (RENDERED, "<|endoftext|>" + RENDERED):
            assert raw(bos_runner, text) == raw(bos_runner, text, add_bos=True) == [BOS, *own]
    assert not caplog.records  # and llama.cpp does not complain of each row
    assert raw(bos_runner, "<|endoftext|>" + RENDERED, add_bos=False) == [BOS, *own]  # the text's own
    assert raw(bos_runner, "a<|endoftext|>")[0] == BOS


def test_a_chat_brings_its_own_bos_or_none(bos_runner: BaseLLMRunner) -> None:
    own = ids(bos_runner, "hi", add_bos=False)
    assert ids(bos_runner, "hi") == own
    assert own[0] != BOS
    assert ids(bos_runner, "hi", add_bos=True) == [BOS, *own]


def test_a_tokenizer_of_transformers_adds_what_it_adds_once(transformers_runner: BaseLLMRunner) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    from llmpipe.runners.transformers.tokens import Tokens

    tokenizer = AutoTokenizer.from_pretrained(transformers_runner._tokenizer.name_or_path)  # type: ignore[attr-defined]
    tokens = [("<|endoftext|>", BOS), ("<|im_end|>", END)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<|endoftext|> $A <|im_end|>", special_tokens=tokens
    )
    found = Tokens(tokenizer)
    assert found.around == Around(None, (BOS,), (END,))
    for text in ("hi", "<|endoftext|>hi", "hi<|im_end|>", "<|endoftext|>hi<|im_end|>"):
        whole = found.around.put(found.tokenize(text), raw=True, add_bos=None)
        assert whole == tokenizer("hi")["input_ids"]


def test_what_stands_around_a_text_is_found_by_what_it_adds() -> None:
    assert Around.between(1, [5, 6], [1, 5, 6, 2]) == Around(1, (1,), (2,))
    assert Around.between(1, [], [1]) == Around(1, (1,))
    assert Around.between(None, [5], [5]) == Around(None)
    assert Around.between(1, [5], [6]) == Around(1)  # it reads a text in another way then: nothing can be told


@pytest.mark.parametrize(
    ("around", "tokens", "raw", "add_bos", "expected"),
    [
        (Around(7), [1], True, None, [1]),
        (Around(7), [1], True, True, [7, 1]),
        (Around(7), [7, 1], True, True, [7, 1]),
        (Around(7), [1], False, True, [7, 1]),
        (Around(7, (7,)), [], True, None, [7]),
        (Around(7, (7,)), [7], True, None, [7]),
        (Around(7, (7,), (9,)), [1], False, None, [1]),
        (Around(7, (7,), (9,)), [1], True, False, [1, 9]),
        (Around(None, (5, 6)), [5, 6, 1], True, None, [5, 6, 1]),
        (Around(None, (5, 6)), [1], True, None, [5, 6, 1]),
        (Around(5, (5, 6)), [5, 1], True, None, [5, 1]),
    ],
)
def test_what_belongs_around_a_prompt(
    around: Around, tokens: list[int], raw: bool, add_bos: bool | None, expected: list[int]
) -> None:
    assert around.put(tokens, raw, add_bos) == expected


def test_where_a_model_has_no_bos_none_can_be_asked_for(transformers_runner: BaseLLMRunner) -> None:
    with pytest.raises(ValueError, match="prompt.add_bos=true, but the model has no BOS token"):
        raw(transformers_runner, "hi", add_bos=True)
    with pytest.raises(LLMConfigError, match="add_bos='yes' is not allowed"):
        transformers_runner.request("hi", add_bos="yes")


def test_a_run_is_told_whether_prompts_get_bos(
    adding_bos: Path, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    data = write_jsonl({"prompt": RENDERED}, {"prompt": "<|endoftext|>" + RENDERED})
    fixed = [f"backend.model={adding_bos}", f"dataset.path={data}", "prompt=raw", "sampling.max_tokens=1"]
    totals = {
        add_bos: run(compose([*fixed, f"prompt.add_bos={add_bos}"]), tmp_path / add_bos)["prompt_tokens"]
        for add_bos in ("auto", "true", "false")
    }
    assert totals["auto"] == totals["true"] == totals["false"] + 1
    with pytest.raises(LLMConfigError, match="prompt.add_bos='never' is not allowed; it must be auto, true or false"):
        compose([*fixed, "prompt.add_bos=never"])


# --- tokens that end an answer ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def padded_runner() -> Iterator[BaseLLMRunner]:
    config = {"backend": "transformers", "temperature": 0.0, "device": "cpu", "threads": 1, "batching": "padded"}
    with LLMRunnerFactory.create_runner(config) as runner:
        yield runner


@pytest.fixture(params=["llama_cpp", "transformers", "padded"])
def any_runner(request: pytest.FixtureRequest) -> BaseLLMRunner:
    found: BaseLLMRunner = request.getfixturevalue(f"{request.param}_runner")
    return found


def test_a_stop_token_ends_an_answer_and_is_no_part_of_it(any_runner: BaseLLMRunner) -> None:
    (whole,) = any_runner.run([STORY], max_tokens=12)
    tokens = raw(any_runner, str(whole.text))
    at = next(i for i in range(4, len(tokens)) if tokens.index(tokens[i]) == i)
    requests = [
        any_runner.request(STORY, i, max_tokens=12, stop_token_ids=stop) for i, stop in enumerate([[tokens[at]], []])
    ]
    done, other = any_runner.run(requests)
    assert (done.finish_reason, done.completion_tokens) == ("stop", at)
    assert raw(any_runner, str(done.text)) == tokens[:at]
    assert (other.text, other.finish_reason) == (whole.text, "length")


@pytest.mark.parametrize(
    "how", [{"stop": ["<|im_end|>"]}, {"stop_token_ids": [END]}, {"stop": ["x", "<|im_end|>"]}], ids=str
)
def test_a_control_token_stops_by_its_text_or_its_id_also_where_end_tokens_do_not(
    how: dict[str, Any], any_runner: BaseLLMRunner
) -> None:
    prompt = QUESTIONS[0]
    (expected,) = any_runner.run([prompt], max_tokens=30)
    (endless,) = any_runner.run([prompt], max_tokens=30, ignore_eos=True)
    assert (expected.finish_reason, endless.finish_reason) == ("stop", "length")
    (done,) = any_runner.run([prompt], max_tokens=30, ignore_eos=True, **how)
    assert (done.text, done.finish_reason) == (expected.text, "stop")
    assert done.completion_tokens == expected.completion_tokens


def test_a_stop_string_that_is_a_control_token_is_looked_for_in_the_text_as_well(
    transformers_runner: BaseLLMRunner,
) -> None:
    requests = [transformers_runner.request("hi", stop=["<|im_end|>", "x"], stop_token_ids=[7])]
    (found,) = with_stop_tokens(requests, transformers_runner._tokens)  # type: ignore[attr-defined]
    assert (found.sampling.stop, found.sampling.stop_token_ids) == (["<|im_end|>", "x"], [7, END])


def test_stop_tokens_that_the_model_does_not_have_are_refused_by_name(any_runner: BaseLLMRunner) -> None:
    (done,) = any_runner.run([STORY], stop_token_ids=[5, 1_000_000])
    assert "stop_token_ids names token 1000000; the model has tokens 0 to 1535" in str(done.error)
    refused = [(5, "a list"), ("5", "a list"), ([-1], "a list of token ids"), (["x"], "an integer")]
    for wrong, allowed in [*refused, ([True], "an integer"), ([1.5], "an integer")]:
        with pytest.raises(LLMConfigError, match=f"stop_token_ids=.* is not allowed; it must be {allowed}"):
            any_runner.request(STORY, stop_token_ids=wrong)
    assert any_runner.request(STORY, stop_token_ids=["5", 6.0]).sampling.stop_token_ids == [5, 6]  # as elsewhere


def test_a_row_may_have_stop_tokens_of_its_own(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    data = write_jsonl({"prompt": QUESTIONS[0]}, {"prompt": QUESTIONS[0], "sampling": {"stop_token_ids": [END]}})
    fixed = [f"dataset.path={data}", "sampling.max_tokens=20", "sampling.ignore_eos=true", "backend.threads=1"]
    assert run(compose(fixed), tmp_path / "a")["completion_tokens"] < 40
    assert run(compose([*fixed, f"sampling.stop_token_ids=[{END}]"]), tmp_path / "b")["completion_tokens"] < 30

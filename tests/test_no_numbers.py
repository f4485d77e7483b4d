"""A model that computes NaN or infinity: every sampler says so, and the rows beside and after it are as without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_models
import numpy as np
import pytest
import torch

from llmpipe import BaseLLMRunner, LlamaCppRunner, SamplingConfig
from llmpipe.runners.transformers import TransformersRunner
from llmpipe.runners.transformers.sampler import Sampler, choose

SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"ignore_eos": True, "stop": ["never"]},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 0.7, "min_p": 0.1},
    {"temperature": 0.7, "typical_p": 0.9},
    {"repetition_penalty": 1.2},
    {"presence_penalty": 0.5},
    {"frequency_penalty": 0.5, "temperature": 0.7},
    {"logit_bias": {50: 2.0}},
]
BROKEN = "~"
"""Of a model made here, the text of the token that becomes NaN or infinity."""


def mixed(runner: BaseLLMRunner, broken: str) -> list[Any]:
    """Return a row that breaks and one that does not for each sampling, in turn."""
    return [
        runner.request(prompt, 2 * i + j, "raw", **{"temperature": 0.0, "max_tokens": 6, **sampling})
        for i, sampling in enumerate(SAMPLINGS)
        for j, prompt in enumerate((f"A row {i} with {broken} in the middle of it", f"Row {i} is a good one"))
    ]


def check(runner: BaseLLMRunner, broken: str = BROKEN) -> None:
    """Check that the rows that break say so, and that the others give what they give without them."""
    requests = mixed(runner, broken)
    expected = [c.text for c in runner.run(requests[1::2])]
    done = runner.run(requests)
    assert {c.error for c in done[::2]} == {
        "the model computed NaN instead of logits: try a wider number format, or milder penalties"
    }
    assert [(c.text, c.error) for c in done[1::2]] == [(text, None) for text in expected]


@pytest.fixture
def write_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a GGUF file in which one token's embedding, or the output for all tokens, is broken."""

    def write(arch: str, value: float, tensor: str = "token_embd.weight") -> Path:
        weights = gguf_models._weights

        def broken(name: str, shape: tuple[int, ...], random: np.random.Generator) -> Any:
            made = weights(name, shape, random)
            if name == tensor:
                made[ord(BROKEN)] = value
            elif name == "output.weight":
                made[ord(BROKEN)] = 0  # nobody says it
            return made

        monkeypatch.setattr(gguf_models, "_weights", broken)
        return gguf_models.write_model(tmp_path / f"{arch}.gguf", arch)

    return write


@pytest.mark.parametrize("arch", ["llama", "mamba"])
@pytest.mark.parametrize("options", [{"slots": 1}, {"slots": 3}, {"slots": 3, "reproducible": True}], ids=str)
def test_rows_of_nan_are_errors_in_llama_cpp(
    arch: str, options: dict[str, Any], write_broken: Callable[..., Path]
) -> None:
    """With attention that is not fused, as in reproducible mode, a NaN that a row left behind reaches the next one."""
    with LlamaCppRunner({"model": str(write_broken(arch, np.nan)), "threads": 1, **options}, "cpu") as runner:
        check(runner)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_a_single_logit_that_is_no_number_is_enough_in_llama_cpp(
    value: float, write_broken: Callable[..., Path]
) -> None:
    path = write_broken("llama", value, "output.weight")
    with LlamaCppRunner({"model": str(path), "threads": 1}, "cpu") as runner:
        assert all("NaN" in (c.error or "") for c in runner.run(mixed(runner, "x")))


@pytest.mark.parametrize("batching", ["slots", "padded"])
def test_rows_of_nan_are_errors_in_transformers(batching: str) -> None:
    with TransformersRunner({"model": "bundled", "threads": 1, "slots": 3, "batching": batching}, "cpu") as runner:
        (broken,) = runner._tokenizer("§", add_special_tokens=False)["input_ids"][:1]

        def break_token(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output.masked_fill((inputs[0] == broken)[..., None], float("nan"))

        runner._model.model.embed_tokens.register_forward_hook(break_token)
        check(runner, "§")


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_logits_that_are_no_numbers_cost_their_own_row_only(sampling: dict[str, Any]) -> None:
    good = torch.linspace(-1, 3, 80)
    rows = torch.stack([good] * 6)
    rows[1, 7], rows[2, 7], rows[3, 7], rows[4] = float("nan"), float("inf"), float("-inf"), float("-inf")
    samplers = [Sampler(SamplingConfig(**sampling), 3, [1, 2]) for _ in rows]
    tokens = choose(rows, samplers)
    assert [token < 0 for token in tokens] == [False, True, True, False, True, False]
    assert tokens[0] == tokens[5]


@pytest.mark.parametrize("backend", ["llama_cpp", "transformers"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_penalty_that_makes_logits_infinite_is_an_error(
    backend: str, temperature: float, request: pytest.FixtureRequest
) -> None:
    runner: BaseLLMRunner = request.getfixturevalue(f"{backend}_runner")
    options = {"temperature": temperature, "typical_p": 0.9, "max_tokens": 4, "ignore_eos": True}
    wild, mild = (
        runner.request("a b c d", i, "raw", repetition_penalty=penalty, **options)
        for i, penalty in enumerate((1e-40, 0.5))
    )
    done = runner.run([wild, mild])
    assert "milder penalties" in (done[0].error or "")
    assert done[1].error is None


@pytest.mark.parametrize("arch", ["llama", "mamba"])
@pytest.mark.parametrize("broken", [[1, 2], [1]], ids=str)
def test_rows_left_behind_by_rows_of_nan_are_as_alone_in_reproducible_mode(
    arch: str, broken: list[int], write_broken: Callable[..., Path]
) -> None:
    """The broken ones say what breaks them, and leave slots below those of the others."""
    options = {"model": str(write_broken(arch, np.nan)), "threads": 1, "slots": 3, "reproducible": True}
    sampling: dict[str, Any] = {"temperature": 0.9, "max_tokens": 12, "ignore_eos": True}
    with LlamaCppRunner(options, "cpu") as runner:
        asked = [
            runner.request(f"Row {i}", i, "raw", **sampling, logit_bias={ord(BROKEN): 1e4} if i in broken else {})
            for i in range(3)
        ]
        expected = {i: runner.run([asked[i]])[0].text for i in range(3) if i not in broken}
        done = runner.run(asked)
    assert {completion.request_id: completion.text for completion in done if completion.error is None} == expected
    assert all("NaN" in (done[i].error or "") for i in broken)

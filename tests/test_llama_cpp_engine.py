"""The llama.cpp engine: sharing, sizing and cancelling change how fast rows are answered, never what."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmpipe import LlamaCppRunner, LLMInitializationError, Request, SamplingConfig
from llmpipe.config import data_dir
from llmpipe.records import Chunk

STORY = "Tell me a story about a fox and a lantern, please, and let it be about " + "a very small house, " * 8


def make(**options: Any) -> LlamaCppRunner:
    return LlamaCppRunner({"model": "bundled", **options}, "cpu")


@pytest.fixture(scope="module")
def runner() -> Iterator[LlamaCppRunner]:
    with make() as made:
        yield made


def requests(prompts: list[str], **sampling: Any) -> list[Request]:
    options = SamplingConfig(**{"max_tokens": 20, **sampling})
    messages = [({"role": "user", "content": prompt},) for prompt in prompts]
    return [Request(i, options, messages=m, seed=i, samples=tuple(range(options.n))) for i, m in enumerate(messages)]


def texts(runner: LlamaCppRunner, asked: list[Request]) -> dict[tuple[int, int], str | None]:
    return {(c.request_id, c.sample): c.text for c in runner.completions(asked)}


def test_rows_with_a_common_prefix_compute_it_once_and_answer_as_alone(runner: LlamaCppRunner) -> None:
    asked = requests([f"{STORY} number {i}" for i in range(6)])
    done = sorted(runner.completions(asked), key=lambda c: c.request_id)
    cached = [c.cached_prompt_tokens or 0 for c in done]
    assert sum(count > 0 for count in cached) == 5  # one row pays for the prefix, the others copy it
    assert all(count < (c.prompt_tokens or 0) for count, c in zip(cached, done, strict=True))
    alone = [next(iter(runner.completions([request]))).text for request in asked]
    assert [c.text for c in done] == alone


def test_two_groups_of_prefixes_are_both_shared(runner: LlamaCppRunner) -> None:
    other = STORY.replace("fox", "queen").replace("small", "large")
    done = list(runner.completions(requests([f"{(STORY, other)[i % 2]} number {i}" for i in range(8)])))
    assert sum((c.cached_prompt_tokens or 0) > 0 for c in done) == 6


def test_samples_of_one_prompt_share_its_prefill_and_differ(runner: LlamaCppRunner) -> None:
    asked = requests([STORY], n=6, temperature=1.0)
    done = list(runner.completions(asked))
    assert sum((c.cached_prompt_tokens or 0) > 0 for c in done) == 5
    assert len({c.text for c in done}) > 1
    again = texts(runner, asked)
    assert {(c.request_id, c.sample): c.text for c in done} == again


def test_reproducible_mode_shares_nothing_and_does_not_depend_on_slots() -> None:
    prompts = [f"{STORY} number {i}" for i in range(5)] + ["What is 12 + 30?", "Hello!"]
    answers = []
    for slots in (1, 3, 16):
        with make(reproducible=True, slots=slots) as runner:
            done = list(runner.completions(requests(prompts, temperature=0.9)))
            assert all(c.cached_prompt_tokens == 0 for c in done)
            answers.append({c.request_id: c.text for c in done})
    assert answers[0] == answers[1] == answers[2]


def test_a_story_is_bit_for_bit_the_same_alone_and_among_others_in_reproducible_mode() -> None:
    """Long answers over f16 caches: rounding that differs anywhere shows in some of them."""
    lines = (data_dir() / "open.jsonl").read_text().splitlines()
    asked = requests([json.loads(line)["prompt"] for line in lines], max_tokens=150)
    answers = []
    for slots, order in ((1, 1), (16, -1)):
        with make(reproducible=True, slots=slots) as runner:
            answers.append({c.request_id: c.text for c in runner.completions(asked[::order])})
    assert answers[0] == answers[1]


def test_a_row_that_needs_a_larger_slot_gets_one_later() -> None:
    short = requests(["What is 12 + 30?"] * 70, max_tokens=5)
    long = replace(requests([STORY * 6], max_tokens=30)[0], id=70)
    with make(slots=4) as runner:
        done = {c.request_id: c for c in runner.completions([*short, long])}
        assert len(done) == 71 and all(c.error is None for c in done.values())
        with make(slots=1) as alone:
            assert done[70].text == next(iter(alone.completions([long]))).text


def test_a_context_set_by_hand_bounds_prompt_and_completion() -> None:
    with make(context=64) as runner:
        long, short = runner.completions(requests([STORY, "Hello!"]))
        assert "backend.context" in (long.error or "")
        assert short.error is None


def test_a_cancelled_request_ends_at_once_and_its_neighbours_go_on(runner: LlamaCppRunner) -> None:
    asked = requests(["Tell me a story about a fox.", "Tell me a story about a bear."], max_tokens=60)
    chunks: list[Chunk] = []
    for chunk in runner.stream(asked):
        chunks.append(chunk)
        if len(chunks) == 4:
            runner.cancel(0)
    last = {chunk.request_id: chunk for chunk in chunks}
    assert (last[0].finish_reason, last[0].error) == ("error", "cancelled")
    assert last[1].finish_reason in ("stop", "length")
    assert "".join(c.text for c in chunks if c.request_id == 1) == texts(runner, asked)[1, 0]


def test_closing_a_stream_midway_leaves_the_runner_usable(runner: LlamaCppRunner) -> None:
    asked = requests([STORY, "Hello!", "What is 12 + 30?"], max_tokens=50)
    before = texts(runner, asked)
    stream = runner.stream(asked)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert texts(runner, asked) == before


def test_the_choices_and_their_reasons_are_told(runner: LlamaCppRunner) -> None:
    list(runner.completions(requests(["Hello!"] * 3)))
    info = runner.info()
    assert info["slots"] >= info["most_rows_in_flight"] >= 3 and info["slot_tokens"] % 256 == 0
    assert any("slots" in reason for reason in info["sizes"])


def test_the_reasons_are_those_of_the_sizes_there_are() -> None:
    with make() as runner:
        list(runner.completions(requests(["Hello!"] * 3, max_tokens=2)))
        assert "3 slots: no more rows than that wait" in runner.info()["sizes"]
        list(runner.completions(requests(["Hello!"] * 5, max_tokens=2)))
        info = runner.info()
        assert info["slots"] == info["most_rows_in_flight"] == 5
        assert [reason for reason in info["sizes"] if "wait" in reason] == ["5 slots: no more rows than that wait"]


def test_quantised_caches_and_rope_options_are_passed_on() -> None:
    with make(cache_type_k="q8_0", cache_type_v="q8_0", flash_attention="on") as runner:
        assert runner.generate_text("What is the capital of France?") == "Paris"
    with make(rope_scaling="linear", rope_freq_scale=0.5) as runner:
        stretched = runner.generate_text("What is 12 + 30?", max_tokens=8)
    with make() as runner:
        assert runner.generate_text("What is 12 + 30?", max_tokens=8) != stretched


def test_a_missing_or_unreadable_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(LLMInitializationError, match="nowhere.gguf"):
        make(lora=["nowhere.gguf"])
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(LLMInitializationError, match="cannot load the adapter"):
        make(lora=[str(tmp_path / "bad.gguf")])
    with pytest.raises(LLMInitializationError, match="a=b.gguf"):
        make(lora=["a=b.gguf=0.5"])


def test_a_row_whose_slot_cannot_be_had_is_an_error_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmpipe.runners.llama_cpp import executor

    real = executor.LlamaContext

    def scarce(model: Any, config: Any, plan: Any, *rest: Any) -> Any:
        if plan.context > 512:
            raise LLMInitializationError("no memory")
        return real(model, config, plan, *rest)

    monkeypatch.setattr(executor, "LlamaContext", scarce)
    short, long = requests(["What is 12 + 30?"] * 6, max_tokens=5), replace(requests([STORY * 8])[0], id=9)
    for slots in ("auto", 4):
        with make(slots=slots) as runner:
            done = {c.request_id: c for c in runner.completions([long, *short])}
        assert done[9].error == "no memory"
        assert all(done[i].error is None for i in range(6))


def test_rows_of_a_later_block_reuse_a_prefix_and_evict_the_oldest(runner: LlamaCppRunner) -> None:
    subjects = ["fox", "queen", "robot", "whale", "clock", "tower"]
    prompts = [STORY.replace("fox", subject) + f" number {i}" for i in range(40) for subject in subjects]
    done = sorted(runner.completions(requests(prompts, max_tokens=2)), key=lambda c: c.request_id)
    assert sum((c.cached_prompt_tokens or 0) > 0 for c in done) > 200
    some = list(range(0, 240, 37))
    with make(reproducible=True) as alone:
        again = [next(iter(alone.completions([requests(prompts, max_tokens=2)[i]]))).text for i in some]
    assert [done[i].text for i in some] == again


def test_a_token_that_is_computed_by_itself_has_the_same_logits_beside_other_rows_in_reproducible_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last token of 17, in micro-batches of 16, is a product of one row, which is rounded as no other is."""
    import llama_cpp
    import numpy as np

    from llmpipe.runners.llama_cpp.context import LlamaContext

    seen: list[Any] = []
    best_tokens = LlamaContext.best_tokens

    def spy(context: LlamaContext) -> Any:
        shape = (len(context.batch.output_indices), context._model.n_vocab)
        seen.extend(np.ctypeslib.as_array(llama_cpp.llama_get_logits(context.handle), shape).copy())
        return best_tokens(context)

    monkeypatch.setattr(LlamaContext, "best_tokens", spy)
    for slots, rows in ((1, 1), (8, 8)):
        asked = [Request(i, SamplingConfig(temperature=0, max_tokens=1), prompt=" a" * 17) for i in range(rows)]
        with make(reproducible=True, slots=slots, micro_batch_tokens=16) as runner:
            assert {c.prompt_tokens for c in runner.completions(asked)} == {17}
    assert len(seen) == 9
    assert all((logits == seen[0]).all() for logits in seen)

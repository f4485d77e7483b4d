"""Mixes of rows for property tests of runners, and what the rows of a mix give in a batch and alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pyarrow.parquet as pq
from hypothesis import strategies as st

from llmpipe import BaseLLMRunner, Request
from llmpipe.config import data_dir
from llmpipe.records import Completion

STORY = "Tell me a story about a squirrel and an umbrella."
QUESTIONS = [json.loads(line)["prompt"] for line in (data_dir() / "questions.jsonl").open(encoding="utf-8")]
CHATS = pq.read_table(data_dir() / "chats.parquet").column("messages").to_pylist()
STORIES = [json.loads(line)["prompt"] for line in (data_dir() / "open.jsonl").open(encoding="utf-8")]
LONG = "word " * 3000
SURROGATE = "half a pair: \ud83d"
POOL = [QUESTIONS[0], STORY, "word " * 60, "é日本🙂", CHATS[1], "", LONG, SURROGATE, ()]
SAMPLINGS = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 12), "temperature": st.sampled_from([0, 0.7, 1.5]), "n": st.integers(1, 3)},
    optional={
        "stop": st.lists(st.sampled_from(["a", "the", " t", "e w", ".", "\n", "th"]), max_size=3),
        "seed": st.integers(0, 2**31),
        "top_k": st.integers(0, 50),
        "top_p": st.floats(0.1, 1),
        "repetition_penalty": st.floats(0.8, 1.5),
        "presence_penalty": st.floats(-1, 2),
        "frequency_penalty": st.floats(-1, 2),
        "logit_bias": st.dictionaries(st.integers(0, 1535), st.floats(-20, 20), max_size=3),
        "ignore_eos": st.booleans(),
    },
)
MIXES = st.lists(st.tuples(st.sampled_from(POOL), st.sampled_from(["chat", "raw"]), SAMPLINGS), max_size=7)

Answer = tuple[Any, ...]


def requests_of(runner: BaseLLMRunner, mix: list[tuple[Any, str, dict[str, Any]]]) -> list[Request]:
    return [
        runner.request(list(prompt) if isinstance(prompt, tuple) else prompt, i, prompt_format, **sampling)
        for i, (prompt, prompt_format, sampling) in enumerate(mix)
    ]


def collect(completions: Iterable[Completion]) -> dict[tuple[int, int], Answer]:
    """Return (request, sample) → its answer."""
    done = list(completions)
    found = {
        (c.request_id, c.sample): (c.text, c.finish_reason, c.prompt_tokens, c.completion_tokens, c.error) for c in done
    }
    assert len(found) == len(done)
    return found


def answers(runner: BaseLLMRunner, requests: Iterable[Request]) -> dict[tuple[int, int], Answer]:
    return collect(runner.completions(requests))


def alone(runner: BaseLLMRunner, requests: Iterable[Request]) -> dict[tuple[int, int], Answer]:
    """Return what `answers` does, with a stream for each sample."""
    found: dict[tuple[int, int], Answer] = {}
    for request in requests:
        for sample in request.samples:
            found.update(answers(runner, [replace(request, samples=(sample,))]))
    return found

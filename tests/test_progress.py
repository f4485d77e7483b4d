"""How far a run is, and how long it will take, against runs whose end is known."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llmpipe
from llmpipe import LLMError
from llmpipe.config import SamplingConfig
from llmpipe.progress import Progress, expected_rest
from llmpipe.records import Chunk, Completion, Request
from llmpipe.stopwatch import Stopwatch

SLOTS = 16
MOST = 256
LENGTHS: dict[str, Callable[[random.Random], int]] = {
    "all as long as they may be": lambda _: MOST,
    "all alike": lambda _: 60,
    "of any length": lambda dice: min(MOST, 1 + int(dice.expovariate(1 / 50))),
    "short or long": lambda dice: dice.choice([5, 200]),
    "one token": lambda _: 1,
}


class Clock:
    """What a batching engine does to the time: prompts in calls of their own, then a token for each row in flight."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, prompt_s: float) -> None:
        self.now, self.prompt_s = 100.0, prompt_s
        monkeypatch.setattr("time.monotonic", lambda: self.now)

    def steps(self, lengths: list[int], stopwatch: Stopwatch) -> Iterator[list[Chunk]]:
        waiting = iter(stopwatch.watch(Request(i, SamplingConfig()) for i in range(len(lengths))))
        rows: dict[int, int] = {}
        while True:
            while len(rows) < SLOTS and (request := next(waiting, None)) is not None:
                self.now += self.prompt_s
                rows[request.id] = 0
            if not rows:
                return
            self.now += 0.05
            rows = {row: tokens + 1 for row, tokens in rows.items()}
            ended = {row: tokens for row, tokens in rows.items() if tokens == lengths[row]}
            ends = {row: "stop" for row in ended}
            yield [Chunk(row, 0, "x", ends.get(row), completion_tokens=ended.get(row)) for row in rows]
            rows = {row: tokens for row, tokens in rows.items() if row not in ended}


@pytest.mark.parametrize("prompt_s", [0.001, 0.5])
@pytest.mark.parametrize("kind", LENGTHS)
def test_the_time_left_is_about_right_from_the_first_seconds_on(
    kind: str, prompt_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(0)
    lengths = [LENGTHS[kind](dice) for _ in range(400)]
    stopwatch = Stopwatch()
    clock = Clock(monkeypatch, prompt_s)
    began, said, looked = clock.now, list[tuple[float, float]](), 0.0
    progress = Progress(stopwatch, 0, len(lengths), MOST)
    for chunks in clock.steps(lengths, stopwatch):
        for completion in filter(None, map(stopwatch.add, chunks)):
            progress.done += 1
            progress.note(completion)
        if clock.now - looked >= 0.25:
            looked, left_s = clock.now, progress.outlook().left_s
            if left_s is not None:
                said.append((clock.now - began, left_s))
    whole = clock.now - began
    assert progress.tokens == sum(lengths)
    assert said[0][0] < 0.05 * whole + 1.5
    for at, left in said:
        if at > 0.1 * whole:  # by then answers have ended
            assert abs(at + left - whole) < 0.35 * whole, (at, left, whole)
        if at > 0.5 * whole:
            assert abs(at + left - whole) < 0.15 * whole, (at, left, whole)


def test_the_rate_is_that_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = Progress(Stopwatch(), 0, 1000, MOST)
    for second in range(1, 41):
        now = float(second)
        progress.note(Completion(second, completion_tokens=100 if second <= 20 else 10))
        rate = progress.outlook().tokens_per_s
    assert rate == pytest.approx(10, rel=0.1)


def test_as_many_answers_are_expected_as_there_will_be_whatever_rows_ask_for_and_fail(
    write_jsonl: Callable[..., Path], echo_config: Callable[..., llmpipe.RunConfig], tmp_path: Path
) -> None:
    rows = [{"prompt": "a"}, {"prompt": 7}, {"prompt": "b", "sampling": {"n": 5}}, {"prompt": "c"}]
    config = echo_config(write_jsonl(*rows), "sampling.n=2", "sampling.temperature=1")
    seen: list[tuple[int, int]] = []

    def watch(progress: Progress) -> None:
        seen.append((progress.done, progress.expected))
        if len(seen) == 4:
            raise LLMError("enough")

    for _ in range(2):
        with suppress(LLMError):
            llmpipe.run(config, tmp_path / "out", watch)
    assert seen[-1] == (10, 10) and {expected for _, expected in seen} <= {7, 8, 10}


def test_nothing_is_foretold_where_nothing_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress(Stopwatch(), 5, 10, MOST)
    assert progress.outlook()[1:] == (None, 5)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(0, 50))
def test_once_all_answers_have_ended_those_to_come_are_as_long_as_those_were(ended: list[int], at: int) -> None:
    longer = [n for n in ended if n >= at]
    if longer:
        many = {n: times * 10**9 for n, times in Counter(ended).items()}  # among which the one does not count
        assert expected_rest(many, [at], 1000) == pytest.approx([sum(longer) / len(longer) - at], abs=1e-5)


@given(st.lists(st.integers(0, 50), max_size=30), st.lists(st.integers(0, 50), min_size=1, max_size=30))
def test_no_answer_is_expected_to_be_longer_than_it_may_be(ended: list[int], under_way: list[int]) -> None:
    for length, rest in zip(under_way, expected_rest(Counter(ended), under_way, 50), strict=True):
        assert -1e-9 <= rest <= 50 - length + 1e-9


def test_a_token_more_or_less_is_told_while_an_answer_is_under_way() -> None:
    stopwatch = Stopwatch()
    list(stopwatch.watch([Request(1, SamplingConfig()), Request(2, SamplingConfig())]))
    for chunk in (Chunk(1, 0, "a"), Chunk(2, 0, "a"), Chunk(1, 0, "b"), Chunk(1, 0, ""), Chunk(2, 0, restarts=True)):
        stopwatch.add(chunk)
    assert stopwatch.under_way() == [2, 0] or sorted(stopwatch.under_way()) == [0, 2]

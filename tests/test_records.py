"""Seeds, and chunks summed up to completions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpipe import Chunk, LLMInferenceError, Request, SamplingConfig
from llmpipe.records import Row
from llmpipe.seeds import derive_seed
from llmpipe.stopwatch import complete

SAMPLING = SamplingConfig()


def request(id: int, *samples: int) -> Request:
    return Request(id, SAMPLING, prompt="hi", samples=samples or (0,))


def test_a_seed_is_the_same_on_every_machine() -> None:
    assert derive_seed(0, "row-1") == 4178248522598161734
    assert Request(7, SAMPLING, seed=5).seed_of(2) == derive_seed(5, 2) == 11126141739881149385


@given(st.lists(st.text() | st.integers(), min_size=1, max_size=3))
def test_a_seed_fits_what_backends_take(parts: list[object]) -> None:
    assert 0 <= derive_seed(*parts) < 2**64


def test_no_two_of_a_million_rows_share_a_seed() -> None:
    assert len({derive_seed(0, row) for row in range(1_000_000)}) == 1_000_000


def test_parts_of_a_seed_do_not_run_together() -> None:
    assert len({derive_seed(1, 23), derive_seed(12, 3), derive_seed(123), derive_seed(0, 1, 23)}) == 4


def test_the_seed_of_a_sample_does_not_depend_on_which_samples_are_asked_for() -> None:
    assert request(0, 0, 1, 2).seed_of(2) == request(0, 2).seed_of(2) != request(0, 1).seed_of(1)


@pytest.mark.parametrize(
    ("value", "expected"), [("a", "a"), (3, 3), (3.0, 3), (None, "row-4"), (float("nan"), "row-4"), ([1], "row-4")]
)
def test_a_row_without_a_usable_id_is_named_by_its_position(value: object, expected: object) -> None:
    assert Row("f", 1, {"id": value}, index=4).id("id") == expected


def run(chunks: Iterable[Chunk], *requests: Request) -> list[tuple]:
    def stream(pulled: Iterable[Request]) -> Iterator[Chunk]:
        list(pulled)
        yield from chunks

    done = complete(stream, requests)
    return [(c.request_id, c.sample, c.text, c.finish_reason, c.error) for c in done]


def test_chunks_of_several_rows_are_summed_apart_as_they_finish() -> None:
    chunks = [Chunk(1, 0, "a"), Chunk(2, 1, "x"), Chunk(2, 1, "y", "length"), Chunk(1, 0, "b"), Chunk(1, 0, "", "stop")]
    chunks += [Chunk(2, 0, "z", "stop")]
    expected = [(2, 1, "xy", "length", None), (1, 0, "ab", "stop", None), (2, 0, "z", "stop", None)]
    assert run(chunks, request(1), request(2, 0, 1)) == expected


def test_an_error_has_no_text_and_always_a_reason() -> None:
    chunks = [Chunk(1, 0, "half"), Chunk(1, 0, finish_reason="error"), Chunk(2, finish_reason="error", error="why")]
    expected = [(1, 0, None, "error", "the runner gave no reason"), (2, 0, None, "error", "why")]
    assert run(chunks, request(1), request(2)) == expected


def test_a_sample_that_the_runner_forgets_is_an_error() -> None:
    expected = [(1, 1, "a", "stop", None), (1, 0, None, "error", "the runner ended without an answer")]
    assert run([Chunk(1, 1, "a", "stop")], request(1, 0, 1)) == expected


@pytest.mark.parametrize("chunks", [[Chunk(9, 0, "a")], [Chunk(1, 3, "a")], [Chunk(1, 0, "a", "stop")] * 2])
def test_an_answer_to_what_was_not_asked_is_a_fault_of_the_runner(chunks: list[Chunk]) -> None:
    with pytest.raises(LLMInferenceError, match="not waiting"):
        run(chunks, request(1))


def test_times_count_from_the_moment_a_row_is_pulled() -> None:
    import time

    def stream(pulled: Iterable[Request]) -> Iterator[Chunk]:
        for pulled_request in pulled:
            time.sleep(0.02)
            started_at = time.perf_counter()
            time.sleep(0.02)
            yield Chunk(pulled_request.id, 0, "a")
            time.sleep(0.02)
            yield Chunk(pulled_request.id, 0, "b", "stop", completion_tokens=2, started_at=started_at)

    for done in complete(stream, [request(1), request(2)]):
        assert 0.02 <= (done.queue_s or 0) <= (done.first_token_s or 0) - 0.02
        assert (done.first_token_s or 0) <= (done.latency_s or 0) - 0.02
        assert (done.latency_s or 0) < 5

"""Waiting samples: their order, and the prefixes they share."""

from __future__ import annotations

from itertools import groupby

from hypothesis import given, settings
from hypothesis import strategies as st

from llmpipe import Request, SamplingConfig
from llmpipe.config.sampling import MAX_SAMPLES
from llmpipe.runners.batching.lookahead import MAX_GROUPED, MIN_SHARED_TOKENS, LookAhead, shared_prefixes

SYSTEM = list(range(100, 200))
OTHER = list(range(300, 350))


def ahead_of(
    prompts: list[list[int]], share: bool = True, limit: int = 4096, max_tokens: int = 10, n: int = 1
) -> LookAhead:
    sampling = SamplingConfig(max_tokens=max_tokens, n=n)
    requests = (Request(i, sampling, samples=tuple(range(n))) for i in range(len(prompts)))
    ahead = LookAhead(requests, lambda request: (prompts[request.id], 0), limit, share)
    assert not ahead.fill(10**6)
    return ahead


def taken(ahead: LookAhead, room: int = 10**6) -> list[tuple[int, int]]:
    out = []
    while (sample := ahead.next(room)) is not None:
        out.append((sample.request.id, sample.shared))
    return out


def test_a_common_system_prompt_is_found() -> None:
    prompts = [[*SYSTEM, i, i + 1] for i in range(5)]
    assert shared_prefixes(prompts) == [([0, 1, 2, 3, 4], len(SYSTEM))]


def test_several_groups_are_found_and_strangers_stay_alone() -> None:
    prompts = [[*SYSTEM, 1], [*OTHER, 1], [7, 8, 9], [*SYSTEM, 2], [*OTHER, 2]]
    assert sorted(shared_prefixes(prompts)) == [([0, 3], len(SYSTEM)), ([1, 4], len(OTHER))]


def test_a_deeper_prefix_wins_where_it_saves_more() -> None:
    deep = [[*SYSTEM, *OTHER, i] for i in range(4)]
    shallow = [[*SYSTEM, 900 + i] for i in range(2)]
    groups = shared_prefixes([*deep, *shallow])
    assert ([0, 1, 2, 3], len(SYSTEM) + len(OTHER)) in groups
    assert ([4, 5], len(SYSTEM)) in groups


def test_equal_prompts_share_all_but_their_last_token() -> None:
    assert shared_prefixes([SYSTEM] * 3) == [([0, 1, 2], len(SYSTEM) - 1)]
    ahead = ahead_of([SYSTEM], n=8)
    assert [shared for _, shared in taken(ahead)] == [len(SYSTEM) - 1] * 8


def test_samples_share_their_prompt_however_many_they_are_and_wherever_it_stands() -> None:
    prompts = [*([SYSTEM[0] + i] * 40 + [1] for i in range(MAX_GROUPED + 20)), SYSTEM]
    ahead = ahead_of(prompts, n=MAX_SAMPLES // 256)
    assert len(ahead.waiting) == len(prompts) * 16
    assert all(sample.shared == len(sample.prompt) - 1 for sample in ahead.waiting)
    assert {shared for _, shared in taken(ahead_of([SYSTEM], n=MAX_SAMPLES))} == {len(SYSTEM) - 1}


def test_rows_of_one_text_share_it_as_the_samples_of_a_row_do() -> None:
    ahead = ahead_of([list(SYSTEM) for _ in range(3 * MAX_GROUPED)])
    assert {(sample.shared, id(sample.prompt)) for sample in ahead.waiting} == {
        (len(SYSTEM) - 1, id(ahead.waiting[0].prompt))
    }


def test_prompts_share_a_beginning_and_their_samples_the_whole() -> None:
    ahead = ahead_of([[*SYSTEM, *[500 + i] * 40] for i in range(5)], n=3)
    assert {(sample.base, sample.shared) for sample in ahead.waiting} == {(len(SYSTEM), len(SYSTEM) + 39)}
    numbers = [request for request, _ in taken(ahead)]
    assert len(list(groupby(numbers))) == 5  # the samples of a prompt stay together


def test_the_rest_of_a_prompt_is_shared_where_that_saves_more_than_a_copy_costs() -> None:
    prompts = [[*SYSTEM, 1, 2, 3], [*SYSTEM, 4, 5, 6]]
    few, many = ahead_of(prompts, n=3), ahead_of(prompts, n=40)
    assert {(sample.base, sample.shared) for sample in few.waiting} == {(len(SYSTEM), len(SYSTEM))}
    assert {(sample.base, sample.shared) for sample in many.waiting} == {(len(SYSTEM), len(SYSTEM) + 2)}


def test_short_prefixes_are_not_worth_sharing() -> None:
    assert shared_prefixes([SYSTEM[: MIN_SHARED_TOKENS - 1] + [i] for i in range(9)]) == []


def test_sharing_can_be_switched_off() -> None:
    assert all(shared == 0 for _, shared in taken(ahead_of([[*SYSTEM, i] for i in range(5)], share=False)))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60), st.lists(st.integers(0, 2), max_size=4)), max_size=12))
def test_every_group_really_shares_its_prefix(shapes: list[tuple[int, int, list[int]]]) -> None:
    prompts = [[base] * length + tail + [9] for base, length, tail in shapes]
    seen: set[int] = set()
    for members, length in shared_prefixes(prompts):
        assert len(members) >= 2 and length >= MIN_SHARED_TOKENS
        assert not seen & set(members)
        seen |= set(members)
        assert len({tuple(prompts[i][:length]) for i in members}) == 1
        assert all(len(prompts[i]) > length for i in members)


def test_long_samples_come_first_and_groups_stay_together() -> None:
    prompts = [[1] * 5, [*SYSTEM, 1], [2] * 400, [*SYSTEM, 2, 3], [3] * 50]
    assert [i for i, _ in taken(ahead_of(prompts))] == [2, 3, 1, 4, 0]


def test_a_sample_that_needs_a_larger_slot_waits() -> None:
    ahead = ahead_of([[1] * 5, [2] * 400, [3] * 50])
    assert [i for i, _ in taken(ahead, room=100)] == [2, 0]
    assert [sample.request.id for sample in ahead.waiting] == [1]


def test_only_a_bounded_number_of_requests_is_pulled_ahead() -> None:
    pulled = []

    def requests():  # type: ignore[no-untyped-def]
        for i in range(1000):
            pulled.append(i)
            yield Request(i, SamplingConfig(max_tokens=1))

    ahead = LookAhead(requests(), lambda request: ([1, 2], 0), 100, share=True)
    ahead.fill(10)
    assert len(pulled) == 10
    ahead.next(100)
    ahead.fill(10)
    assert len(pulled) == 11


def test_a_request_that_cannot_be_encoded_ends_with_an_error_for_every_sample() -> None:
    def encode(request: Request) -> tuple[list[int], int]:
        if request.id == 1:
            raise ValueError("no")
        return [1], 0

    requests = [Request(i, SamplingConfig(n=2), samples=(0, 1)) for i in range(3)]
    ahead = LookAhead(requests, encode, 100, share=True)
    chunks = ahead.fill(100)
    assert [(chunk.request_id, chunk.sample, chunk.error) for chunk in chunks] == [(1, 0, "no"), (1, 1, "no")]
    assert sorted(sample.request.id for sample in ahead.waiting) == [0, 0, 2, 2]


def test_requests_that_cannot_be_encoded_do_not_all_go_by_in_one_call() -> None:
    def encode(request: Request) -> tuple[list[int], int]:
        raise ValueError("no")

    ahead = LookAhead((Request(i, SamplingConfig()) for i in range(25)), encode, 100, share=True)
    assert [len(ahead.fill(10)) for _ in range(3)] == [10, 10, 5]
    assert ahead.is_exhausted

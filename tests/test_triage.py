"""Which rows end their process, found out without any process: what is run next, what is noted, who is given up."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpipe import Chunk, LLMInferenceError, Request, SamplingConfig
from llmpipe.runners.deaths import ChildDied, ChildHung, ChildKilled, ChildStarved, death_of
from llmpipe.runners.triage import ALONE_ATTEMPTS, LOSSES, PAUSE_S, Cohort, Losses, Triage

CRASH, HANG, KILL = ChildDied("crashed"), ChildHung("hung"), ChildKilled("was killed")
GIVEN_UP = f"ended its run {ALONE_ATTEMPTS} times, without an answer"


def rows(count: int, samples: tuple[int, ...] = (0,)) -> Iterator[Request]:
    return (Request(i, SamplingConfig(), samples=samples) for i in range(count))


def end(row: Request) -> list[Chunk]:
    return [Chunk(row.id, sample, finish_reason="stop") for sample in row.samples]


class Case:
    """Runs the cohorts of a stream in a child that does not exist.

    Args:
        deeds: What each row does to it, by its id; the others are answered.
        kills: Numbers of the cohorts during which it is killed from outside, having answered nothing.
        ahead: Rows that it pulls at a time.
    """

    def __init__(self, deeds: dict[int, ChildDied], kills: set[int] = frozenset(), ahead: int = 8) -> None:
        self.deeds, self.kills, self.ahead = deeds, kills, ahead
        self.notes: list[dict[int, int]] = []
        self.losses = Losses()
        self.ran: list[list[int]] = []
        """Ids of the rows that each cohort's child pulled."""
        self.outcomes: list[tuple[int, str | None]] = []
        """What each row ended with: the reason of its error, or None."""

    def run(self, requests: Iterator[Request], suspects: dict[int, int] | None = None) -> None:
        triage = Triage(requests, suspects or {}, lambda found: self.notes.append(dict(found)), self.losses)
        while (cohort := triage.next()) is not None:
            if given_up := triage.given_up(cohort):
                self.outcomes += [(chunk.request_id, chunk.error) for chunk in given_up]
                continue
            triage.begin(cohort)
            try:
                self.compute(cohort)
                triage.finish(cohort)
            except ChildDied as death:
                self.outcomes += [(chunk.request_id, chunk.error) for chunk in triage.blame(cohort, death)]
            finally:
                triage.acquit(cohort)

    def compute(self, cohort: Cohort) -> None:
        killed = len(self.ran) in self.kills
        self.ran.append([])
        while (pulled := cohort.pull(self.ahead)) or killed:
            self.ran[-1] += [row.id for row in pulled]
            if killed:
                raise KILL
            for row in pulled:
                if row.id in self.deeds:
                    raise self.deeds[row.id]
                for chunk in end(row):
                    cohort.take(chunk)
                self.losses.forget()
                self.outcomes.append((row.id, None))


@given(
    count=st.integers(0, 60),
    deeds=st.dictionaries(st.integers(0, 59), st.sampled_from([CRASH, HANG, ChildStarved("starved")]), max_size=6),
    kills=st.sets(st.integers(0, 40), max_size=LOSSES - 1),
    ahead=st.integers(1, 33),
)
def test_each_row_that_ends_its_process_is_found_and_all_others_are_answered(
    count: int, deeds: dict[int, ChildDied], kills: set[int], ahead: int
) -> None:
    case = Case(deeds, kills, ahead)
    case.run(rows(count))
    assert sorted(case.outcomes) == [(i, str(deeds[i]) if i in deeds else None) for i in range(count)]
    guilty = [i for i in range(count) if i in deeds]
    assert len(case.ran) <= 1 + (len(kills) + len(guilty)) * (ALONE_ATTEMPTS + 2 * ahead)


def test_how_often_a_row_was_run_alone_is_noted_before_each_time() -> None:
    case = Case({1: CRASH})
    case.run(rows(2))
    assert case.ran[:2] == [[0, 1], [1]]
    assert case.notes == [{1: 0}, {1: 1}, {1: 1}, {1: 2}, {1: 2}, {1: 3}]
    assert case.outcomes == [(0, None), (1, "crashed")]


def test_one_that_hangs_alone_is_not_run_again() -> None:
    case = Case({0: HANG})
    case.run(rows(1))
    assert (case.ran, case.outcomes) == ([[0], [0], []], [(0, "hung")])


def test_suspects_of_an_earlier_run_come_last_and_alone_and_not_more_often_than_in_one() -> None:
    case = Case({1: CRASH})
    case.run(rows(4), {0: ALONE_ATTEMPTS, 1: ALONE_ATTEMPTS - 1, 2: 0})
    assert case.ran == [[3], [1], [2]]
    assert case.outcomes == [(3, None), (0, GIVEN_UP), (1, "crashed"), (2, None)]


def test_one_that_is_killed_from_outside_while_alone_is_put_off_and_that_does_not_count() -> None:
    case = Case({}, kills={0})
    case.run(rows(2), {0: ALONE_ATTEMPTS - 1})
    assert case.ran == [[1], [1], [], [0]]  # with its like, then alone, then what is left of the stream
    case = Case({}, kills={1})
    case.run(rows(2), {0: ALONE_ATTEMPTS - 1, 1: 0})
    assert case.ran == [[], [0], [1], [0]]
    assert case.outcomes == [(1, None), (0, None)]


def test_what_is_killed_again_and_again_with_no_answer_ends_the_stream() -> None:
    case = Case({}, kills=set(range(LOSSES)))
    with pytest.raises(LLMInferenceError, match=f"was killed, and the backend was lost {LOSSES} times in a row"):
        case.run(rows(3))
    assert len(case.ran) == LOSSES and case.outcomes == []


def test_pauses_grow_with_each_loss_and_end_with_an_answer() -> None:
    losses = Losses()
    pauses = []
    for _ in range(LOSSES - 1):
        losses.add("a row", KILL)
        pauses.append(losses.pause_s)
    assert pauses == [PAUSE_S * 2**n for n in range(LOSSES - 1)]
    for _ in range(99):
        losses.pause_longer()
    assert losses.pause_s == PAUSE_S * 2**LOSSES
    losses.forget()
    assert losses.pause_s == 0
    losses.add("a row", KILL)  # counted from the beginning


def test_samples_that_are_answered_are_not_asked_for_again_and_text_that_is_out_is_taken_back() -> None:
    cohort = Cohort(rows(2, samples=(0, 1, 2)))
    cohort.pull(1)
    for chunk in (Chunk(0, 0, "a"), Chunk(0, 1, "b"), Chunk(0, 2), Chunk(0, 1, finish_reason="stop"), Chunk(9, 9, "?")):
        cohort.take(chunk)
    assert [(row.id, row.samples) for row in cohort.held()] == [(0, (0, 2))]
    assert [(chunk.request_id, chunk.sample, chunk.restarts) for chunk in cohort.restarts()][:1] == [(0, 0, True)]
    assert cohort.answered == [] and len(list(cohort.rows)) == 1


@pytest.mark.parametrize(
    ("code", "starved", "kind", "says"),
    [
        (3, True, ChildDied, "ended the backend's process (exit code 3)"),
        (-signal.SIGSEGV, True, ChildDied, "crashed the backend (signal 11, SIGSEGV)"),
        (-99, False, ChildDied, "crashed the backend (signal 99, without a name)"),
        (-signal.SIGTERM, True, ChildKilled, "was ended by a kill from outside (signal 15, SIGTERM)"),
        (-signal.SIGKILL, False, ChildKilled, "was ended by a kill from outside (signal 9, SIGKILL)"),
        (-signal.SIGKILL, True, ChildStarved, "ran the machine out of memory"),
        (None, False, ChildDied, "cut the backend off"),
    ],
)
def test_a_death_says_whether_a_row_may_be_to_blame(
    code: int | None, starved: bool, kind: type[ChildDied], says: str
) -> None:
    death = death_of(code, starved)
    assert type(death) is kind and says in str(death)

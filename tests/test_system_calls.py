"""Killed before any system call that changes its directory, or failed by it, a run goes on as if it had not been.

Finer than the steps of test_crash.py: what SQLite, Hydra and the lock do counts, too.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crashes import SIGKILL, Case, answers, check_kept, committed, small_rows
from faults import COMPILER, FAILING_CALLS, Children

from llmpipe import LedgerError
from llmpipe.ledger import saved_arguments

FIRST_COMMIT = "s fdatasync ledger.sqlite-wal"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    if not COMPILER:
        pytest.skip("needs a C compiler")
    children = Children(count_calls=True)
    yield Case(children, tmp_path_factory.mktemp("calls"), small_rows(), "backend=echo", rows_per_commit=5)
    children.close()


@pytest.fixture(scope="module")
def calls(case: Case) -> list[str]:
    """The calls of a whole run."""
    return calls_of(case)


def calls_of(case: Case, **job: Any) -> list[str]:
    found: list[str] = case.run(case.new_directory(), call=(0, None), **job)["calls"]
    assert {"n mkdir .", "l flock .lock", "n rename .outputs.jsonl.tmp", FIRST_COMMIT} <= set(found)
    return found


def check_goes_on(case: Case, directory: Path, **job: Any) -> None:
    """See that a run that ended anyhow is begun, or continued as told, and ends like any other."""
    known = committed(directory)
    if not (directory / "ledger.sqlite").exists():
        with pytest.raises(LedgerError, match="no run has begun in it; give the run's own command"):
            saved_arguments(directory)
        job.pop("resume", None)
    done = case.run(directory, **job)
    assert done["exit"] == case.code, done
    assert answers(directory) == case.expected
    check_kept(directory, known)
    assert not [path.name for path in directory.iterdir() if path.name.endswith((".tmp", "-journal"))]


def check_failed(case: Case, number: int, name: str, resume: bool) -> None:
    directory = case.new_directory()
    done = case.run(directory, call=(number, name))
    if done["exit"] != case.code:  # what happens after the last rename may fail and do no harm
        assert done["exit"] == 1, (number, name, done)
        assert re.fullmatch(r"llmpipe: cannot .+\n", done["said"]), (number, name, done)
        assert "the run directory" in done["said"] or str(directory) in done["said"], (number, name, done)
        assert "move it away" not in done["said"], (number, name, done)
    check_goes_on(case, directory, resume=resume)


def test_a_run_killed_before_any_call_of_its_beginning_is_begun_or_continued(case: Case) -> None:
    calls = calls_of(case, library=True)
    for call in dict.fromkeys(calls[: calls.index(FIRST_COMMIT) + 1]):  # before the first of those that are alike
        for resume in (False, True):
            directory = case.new_directory()
            assert case.run(directory, call=(calls.index(call) + 1, None), library=True)["exit"] == SIGKILL
            if (directory / "ledger.sqlite").exists() and resume:
                check_goes_on(case, directory, resume=True)
            elif not resume:
                check_goes_on(case, directory, library=True)


@pytest.mark.parametrize("name", FAILING_CALLS)
def test_a_beginning_that_fails_is_said_in_a_line_and_made_good_by_the_next(
    case: Case, calls: list[str], name: str
) -> None:
    for _ in range(2):
        check_failed(case, random.randint(1, calls.index(FIRST_COMMIT) + 1), name, random.random() < 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_killed_before_any_call_goes_on(case: Case, calls: list[str], resume: bool) -> None:
    for number in range(1, len(calls) + 1):
        directory = case.new_directory()
        assert case.run(directory, call=(number, None))["exit"] == SIGKILL
        check_goes_on(case, directory, resume=resume)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILING_CALLS)
def test_a_run_that_any_call_fails_goes_on(case: Case, calls: list[str], name: str) -> None:
    for number in range(1, len(calls) + 1):
        check_failed(case, number, name, resume=number % 2 == 0)

"""Durable progress: what is committed stays, one process at a time, and nothing damaged or foreign is trusted."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from llmpipe.exceptions import LedgerError
from llmpipe.ledger import FILE, VERSION, Ledger, LedgerSnapshot, saved_arguments
from llmpipe.ledger.writing import COMMIT_EVERY_ROWS
from llmpipe.records import Completion, failed
from llmpipe.redaction import differences

ASKED = {"model": "sha256:1", "sampling": {"temperature": 0.0, "stop": []}, "seed": 0}


def in_another_process(code: str, directory: Path) -> subprocess.Popen[str]:
    """Run code that has a ledger open as `ledger`, and answers through stdout."""
    script = f"import sys\nfrom pathlib import Path\nfrom llmpipe.ledger import Ledger\n{code}"
    command = [sys.executable, "-c", script, str(directory)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_completions_come_back_as_they_were_by_row_and_sample(tmp_path: Path) -> None:
    full = Completion(1, 1, "é\u2028\0\ud800", "stop", 3, 1, 2, 4, 0.1, 0.25, 1 / 3, None)
    with Ledger(tmp_path, ASKED) as ledger:
        ledger.add([failed(2, "why\n"), full, Completion(1, 0, "\0é", "length")])
        ledger.commit()
    with Ledger(tmp_path, ASKED) as ledger:
        assert list(ledger.completions()) == [Completion(1, 0, "\0é", "length"), full, failed(2, "why\n")]
        assert (ledger.count(), ledger.rows(), ledger.most_samples()) == (3, 2, 2)
        assert ledger.done(0, 1) == {1: frozenset({0, 1})}
        assert ledger.done(2, 99) == {2: frozenset({0})}


def test_what_is_committed_is_visible_to_other_processes_and_what_is_not_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmpipe.ledger.writing.COMMIT_EVERY_S", 1000)  # so that the second one stays uncommitted
    ledger = Ledger(tmp_path, ASKED)
    ledger.add([Completion(0)])
    ledger.commit()
    ledger.add([Completion(1)])
    with sqlite3.connect(tmp_path / FILE) as other:
        assert other.execute("SELECT row FROM completions").fetchall() == [(0,)]
    ledger.close()
    with Ledger(tmp_path, ASKED) as reopened:
        assert [one.request_id for one in reopened.completions()] == [0]


def test_a_full_group_is_committed_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmpipe.ledger.writing.COMMIT_EVERY_S", 1000)
    with Ledger(tmp_path, ASKED) as ledger:
        ledger.add(Completion(i) for i in range(COMMIT_EVERY_ROWS))
        with sqlite3.connect(tmp_path / FILE) as other:
            assert other.execute("SELECT count(*) FROM completions").fetchone() == (COMMIT_EVERY_ROWS,)


def test_what_was_added_is_durable_within_a_second_though_nobody_adds_more(tmp_path: Path) -> None:
    with Ledger(tmp_path, ASKED) as ledger, sqlite3.connect(tmp_path / FILE) as other:
        ledger.alongside = lambda: {"wall_s": 1.5}
        for row in range(2):  # not only once
            ledger.add([Completion(row)])
            until = time.monotonic() + 1
            while other.execute("SELECT max(row) FROM completions").fetchone() != (row,):
                assert time.monotonic() < until
                time.sleep(0.02)
        assert ledger.get("wall_s") == 1.5


def test_what_the_threads_commit_raises_reaches_whoever_adds_or_asks_and_loses_nothing(tmp_path: Path) -> None:
    with Ledger(tmp_path, ASKED) as ledger:
        figures: list[dict[str, Any]] = []
        ledger.alongside = lambda: figures[0]
        ledger.add([Completion(0)])
        until = time.monotonic() + 2
        with pytest.raises(IndexError):
            while time.monotonic() < until:
                ledger.check()
        with pytest.raises(IndexError):
            ledger.add([Completion(1)])
        figures.append({})
        ledger.commit()
        assert [one.request_id for one in ledger.completions()] == [0]


def test_completions_are_added_and_read_by_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmpipe.ledger.writing.COMMIT_EVERY_S", 0.001)
    monkeypatch.setattr("llmpipe.ledger.writing.COMMIT_EVERY_ROWS", 10)
    with Ledger(tmp_path, ASKED) as ledger:

        def work(first: int) -> None:
            for row in range(first, first + 200):
                ledger.add([Completion(row)])
                ledger.done(0, 1000)
                ledger.set(wall_s=row)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(0, 800, 200)))
        ledger.commit()
        assert [one.request_id for one in ledger.completions()] == list(range(800))


def test_facts_are_kept_and_an_empty_ledger_counts_nothing(tmp_path: Path) -> None:
    with Ledger(tmp_path / "made" / "here", ASKED) as ledger:
        assert (ledger.count(), ledger.rows(), ledger.most_samples(), ledger.get("wall_s")) == (0, 0, 0, None)
        ledger.set(wall_s=1.5, files={"a": "b"})
        ledger.set(wall_s=2.5)
    with Ledger(tmp_path / "made" / "here", ASKED) as ledger:
        assert (ledger.get("wall_s"), ledger.get("files")) == (2.5, {"a": "b"})


def test_the_overrides_of_a_run_are_read_while_it_is_open_or_after_it_was_killed(tmp_path: Path) -> None:
    odd = tmp_path / "a b?c#d%20"
    with Ledger(odd, ASKED, facts={"arguments": ["backend=echo", "seed=1"]}):
        assert saved_arguments(odd) == ["backend=echo", "seed=1"]
    with pytest.raises(LedgerError, match="is no run directory"):
        saved_arguments(tmp_path)


# --- how it begins ----------------------------------------------------------------------------------------------------


def test_a_ledger_has_the_facts_of_its_run_from_the_instant_it_is_there(tmp_path: Path) -> None:
    with Ledger(tmp_path, ASKED, facts={"arguments": ["seed=1"]}):
        assert saved_arguments(tmp_path) == ["seed=1"]
    with Ledger(tmp_path, ASKED, facts={"arguments": ["seed=2"]}):
        assert saved_arguments(tmp_path) == ["seed=1"]


def leave_empty(path: Path) -> None:
    path.touch()


def leave_no_tables(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode=WAL")


def leave_an_unfinished_journal(path: Path) -> None:
    leave_no_tables(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("BEGIN IMMEDIATE")
        db.execute("CREATE TABLE meta (key)")
        db.execute("COMMIT")
        journal = path.with_name(f"{FILE}-wal").read_bytes()
    leave_nothing(path)
    leave_no_tables(path)
    path.with_name(f"{FILE}-wal").write_bytes(journal[: len(journal) // 2])


def leave_another_half(path: Path) -> None:
    path.with_name(f".{FILE}.tmp").write_bytes(b"SQLite format 3")


def leave_nothing(path: Path) -> None:
    for file in path.parent.glob(f"*{FILE}*"):
        file.unlink()


@pytest.mark.parametrize(
    "leave", [leave_nothing, leave_empty, leave_no_tables, leave_an_unfinished_journal, leave_another_half]
)
def test_where_no_run_had_begun_one_is_begun_and_none_can_be_continued(
    tmp_path: Path, leave: Callable[[Path], None]
) -> None:
    leave(tmp_path / FILE)
    for read in (saved_arguments, LedgerSnapshot):
        with pytest.raises(LedgerError, match="no run has begun in it; give the run's own command"):
            read(tmp_path)
    with Ledger(tmp_path, ASKED) as ledger:
        assert (ledger.count(), ledger.get("fingerprint")) == (0, ASKED)
    assert {file.name for file in tmp_path.iterdir()} == {FILE, ".lock"}


def test_the_journal_of_a_ledger_that_was_moved_away_is_not_taken_for_that_of_the_next(tmp_path: Path) -> None:
    with Ledger(tmp_path, ASKED) as ledger:
        ledger.add([Completion(0, text="of another run")])
        ledger.commit()
        journal = (tmp_path / f"{FILE}-wal").read_bytes()
    (tmp_path / FILE).unlink()
    (tmp_path / f"{FILE}-wal").write_bytes(journal)
    with Ledger(tmp_path, ASKED) as ledger:
        assert ledger.count() == 0


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_whose_directory_is_moved_ends_and_goes_on_where_that_is_now(tmp_path: Path, replaced: bool) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    with Ledger(here, ASKED) as ledger:
        ledger.add([Completion(0)])
        ledger.commit()
        here.rename(there)
        other = Ledger(here, {**ASKED, "seed": 1}) if replaced else nullcontext()
        with other, pytest.raises(LedgerError, match="was moved, replaced or deleted"):
            ledger.add([Completion(1)])
            ledger.commit()
    with Ledger(there, ASKED) as ledger:
        assert [one.request_id for one in ledger.completions()] == [0]
        ledger.finish()


def text_of_others(path: Path) -> None:
    path.write_text("mine")


def database_of_others(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE mine (x)")


def link_to_nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [text_of_others, database_of_others, link_to_nowhere, Path.mkdir, os.mkfifo])
def test_what_others_have_where_the_ledger_would_be_is_refused_and_left_as_it_is(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / FILE)
    before = os.lstat(tmp_path / FILE)
    with pytest.raises(LedgerError, match=r"ledger\.sqlite (is damaged or not a ledger|was written by another)"):
        Ledger(tmp_path, ASKED)
    after = os.lstat(tmp_path / FILE)
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"model": None}, "model was 'sha256:1', is None"),
        ({"sampling": {"temperature": 0.7, "stop": []}}, "sampling.temperature was 0.0, is 0.7"),
        ({"sampling": {"temperature": 0.0, "stop": ["x"]}}, r"sampling.stop was \[\], is \['x'\]"),
        ({"limit": 5}, "limit was None, is 5"),
    ],
)
def test_another_fingerprint_is_refused_with_the_difference(tmp_path: Path, change: dict[str, Any], shown: str) -> None:
    with Ledger(tmp_path, ASKED) as ledger:
        ledger.add([Completion(0)])
        ledger.commit()
    with pytest.raises(LedgerError, match=f"another configuration: {shown}. Drop the difference to go on"):
        Ledger(tmp_path, {**ASKED, **change})
    with Ledger(tmp_path, ASKED) as ledger:  # neither locked nor changed
        assert ledger.count() == 1


def test_the_same_fingerprint_is_accepted_whatever_json_makes_of_it(tmp_path: Path) -> None:
    asked = {"stop": ("a", "b"), "bias": {1: 0.5}}
    Ledger(tmp_path, asked).close()
    Ledger(tmp_path, asked).close()


def test_differences_name_nested_keys_of_either_side() -> None:
    assert list(differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": 3}})) == [
        "a.c was 2, is None",
        "a.d was None, is 3",
    ]


def test_a_directory_in_use_by_another_process_is_refused_until_that_one_is_killed(tmp_path: Path) -> None:
    holds = "ledger = Ledger(Path(sys.argv[1]), {})\nprint('open', flush=True)\nsys.stdin.read()"
    other = in_another_process(holds, tmp_path)
    assert other.stdout is not None and other.stdout.readline() == "open\n"
    try:
        with pytest.raises(LedgerError, match="in use by another process"):
            Ledger(tmp_path, {})
    finally:
        other.kill()
        other.communicate()
    Ledger(tmp_path, {}).close()


def test_a_second_ledger_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with Ledger(tmp_path, ASKED), pytest.raises(LedgerError, match="in use"):
        Ledger(tmp_path, ASKED)


def damaged(directory: Path, what: str) -> Path:
    """Make a ledger of some size and damage it."""
    with Ledger(directory, ASKED) as ledger:
        ledger.add(Completion(i, text=f"text {i}" * 20) for i in range(500))
        ledger.commit()
    path = directory / FILE
    data = bytearray(path.read_bytes())
    if what == "cut":
        data = data[: len(data) // 2]
    elif what == "text":
        data = bytearray(b"this is no database\n" * 100)
    elif what == "pages":
        data[8192:24576] = b"\xa5" * 16384
    elif what == "rows":  # a page full of rows that says it has one row less
        page = next(at for at in range(8192, len(data), 4096) if data[at] == 10 and data[at + 4] > 9)
        data[page + 4] -= 1
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("what", ["cut", "text", "pages", "rows"])
def test_a_damaged_ledger_is_refused_by_name_and_left_as_it_is(tmp_path: Path, what: str) -> None:
    path = damaged(tmp_path, what)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"ledger\.sqlite is damaged.*move it away to start again"):
        Ledger(tmp_path, ASKED)
    assert path.read_bytes() == before
    path.unlink()
    Ledger(tmp_path, ASKED).close()  # the lock was given back


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE completions SET data = replace(data, 'text 7t', 'text 8t')",
        "UPDATE completions SET data = X'FF' WHERE row = 7",
        "UPDATE completions SET row = 1000 WHERE row = 7",
        "UPDATE completions SET sample = 1 WHERE row = 7",
        "UPDATE meta SET value = replace(value, '0.0', '0.1') WHERE key = 'fingerprint'",
        "UPDATE meta SET value = '{' WHERE key = 'fingerprint'",
        "UPDATE meta SET key = 'print' WHERE key = 'fingerprint'",
        "DELETE FROM meta",
        "DROP TABLE meta",
        "DROP TABLE completions",
    ],
)
def test_a_ledger_that_says_other_things_than_were_written_is_refused(tmp_path: Path, statement: str) -> None:
    path = damaged(tmp_path, "not")
    with sqlite3.connect(path) as db:
        assert db.execute(statement).rowcount
    with pytest.raises(LedgerError, match=r"ledger\.sqlite is damaged.*move it away to start again"):
        Ledger(tmp_path, ASKED)


def test_damage_while_the_ledger_is_open_is_found_when_it_is_read(tmp_path: Path) -> None:
    with Ledger(tmp_path, ASKED) as ledger:
        ledger.add([Completion(0, text="one")])
        ledger.finish()
        with sqlite3.connect(tmp_path / FILE) as db:
            db.execute("UPDATE completions SET data = replace(data, 'one', 'two')")
        with pytest.raises(LedgerError, match=r"ledger\.sqlite is damaged.*row 0, sample 0"):
            list(ledger.completions())
        assert ledger.finished()
        with sqlite3.connect(tmp_path / FILE) as db:
            db.execute("DELETE FROM completions")
        with pytest.raises(LedgerError, match="of 1 answers 0 are left"):
            ledger.finished()


def test_a_snapshot_has_nothing_that_writes() -> None:
    assert {"add", "commit", "finish", "grow", "set"} <= set(dir(Ledger)) - set(dir(LedgerSnapshot))


def test_damaged_arguments_are_refused(tmp_path: Path) -> None:
    with Ledger(tmp_path, ASKED) as ledger:
        ledger.set(arguments=["seed=1"])
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("UPDATE meta SET value = replace(value, '1', '2') WHERE key = 'arguments'")
    with pytest.raises(LedgerError, match="damaged"):
        saved_arguments(tmp_path)


def test_each_commit_is_synced_and_notes_the_facts_beside_it(tmp_path: Path) -> None:
    with Ledger(tmp_path, ASKED) as ledger:
        assert ledger._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        ledger.alongside = lambda: {"wall_s": 1.5}
        ledger.add([Completion(0)])
        ledger.commit()
        with sqlite3.connect(tmp_path / FILE) as other:
            assert other.execute("SELECT value FROM meta WHERE key = 'wall_s'").fetchone() == ("1.5",)


def test_a_ledger_of_another_version_is_refused(tmp_path: Path) -> None:
    Ledger(tmp_path, ASKED).close()
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("PRAGMA user_version = 1")
    for read in (lambda directory: Ledger(directory, ASKED), LedgerSnapshot, saved_arguments):
        with pytest.raises(LedgerError, match="another version of llmpipe"):
            read(tmp_path)


def test_a_damage_that_sqlite_itself_cannot_tell_of_is_named_all_the_same(tmp_path: Path) -> None:
    Ledger(tmp_path, ASKED).close()
    data = (tmp_path / FILE).read_bytes()
    assert b"CREATE TABLE meta" in data
    (tmp_path / FILE).write_bytes(data.replace(b"CREATE TABLE meta", b"\xa9REATE TABLE meta"))
    for read in (lambda directory: Ledger(directory, ASKED), LedgerSnapshot, saved_arguments):
        with pytest.raises(LedgerError, match=r"ledger\.sqlite is damaged or not a ledger"):
            read(tmp_path)


def test_values_of_a_completion_are_kept_by_their_place_so_other_fields_are_another_version() -> None:
    values = "text finish_reason prompt_tokens cached_prompt_tokens truncated_prompt_tokens completion_tokens"
    times = "queue_s first_token_s latency_s"
    assert [f.name for f in fields(Completion)] == f"request_id sample {values} {times} error scores".split()
    assert VERSION == 4


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot write to the run directory"):
        Ledger(tmp_path / "file" / "run", ASKED)


def test_a_full_disk_is_reported_and_what_was_committed_is_safe(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, ASKED)
    ledger.add([Completion(0)])
    ledger.commit()
    pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")  # as if the disk ended here
    with pytest.raises(LedgerError, match="cannot read or write .*what was committed before is safe"):
        ledger.add(Completion(i, text="x" * 1000) for i in range(1, COMMIT_EVERY_ROWS + 1))
    ledger.close()
    with Ledger(tmp_path, ASKED) as reopened:
        assert reopened.done(0, 10**6) == {0: frozenset({0})}

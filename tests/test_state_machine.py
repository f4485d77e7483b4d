"""Any history of runs, kills, changes and damage: what stands in a run directory is right, or is refused by name."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from faults import durable_steps
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import llmpipe
from llmpipe import Chunk, EchoRunner, LedgerError, Request
from llmpipe.ledger import FILE

OUTPUTS = ("outputs.jsonl", "errors.jsonl", "metrics.json", "report.html")
STEPS = 28
"""A whole run takes as many durable steps, writes not counted, which may be lost without harm."""


class Killed(BaseException):
    """As if the process had ended."""


class Runs(RuleBasedStateMachine):
    """One run directory, what was asked of it, and what was done to it."""

    base = llmpipe.compose(["backend=echo"])
    expected: dict[Any, list[dict[str, Any]]] = {}
    """What an undisturbed run gives, by what was asked."""

    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.gettempdir()) / f"llmpipe-state-machine-{os.getpid()}"
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        self.directory = self.root / "run"
        self.rows = ['{"id": "a", "prompt": "one two"}', "{bad", '{"prompt": "three"}', "", '{"id": 4, "prompt": ""}']
        self.rows += [json.dumps({"id": f"r{i}", "prompt": f"p {i}"}) for i in range(6)]
        self.seed = 0
        self.prefix = ""
        self.written: str | None = None  # the prefix that the files have
        self.asked: Any = None  # of the run in the directory
        self.flipped: tuple[Path, bytes] | None = None  # a damaged file, and what it was
        self.requested: set[int] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    # --- what happens ---------------------------------------------------------------------------------------------

    @rule()
    def run(self) -> None:
        known, whole = self.committed(), self.content()
        foreign = self.asked is None and whole
        self.requested.clear()
        try:
            metrics = self.start(self.directory)
        except LedgerError as error:
            assert self.content() == whole  # refused, and nothing is overwritten
            if "another configuration" in str(error):
                seed, rows = self.asked
                assert (f"seed was {seed}, is {self.seed}" in str(error)) == (seed != self.seed)
                if not self.flipped:  # else a run may have ended at the damage, having noted that the dataset has grown
                    assert ("dataset.digest was" in str(error)) == (rows != self.rows[: len(rows)])
                    assert not self.goes_on
            elif "is not of this run; move it away" in str(error):
                assert foreign
            else:
                assert self.flipped is not None and f"{self.flipped[0]} " in str(error)
            return
        assert not foreign and self.goes_on
        assert self.flipped is None or self.flipped[0].name == FILE  # some of its bytes mean nothing
        grown, self.asked, self.flipped = self.asked not in (None, self.asks), self.asks, None
        assert answers(self.directory) == self.undisturbed()
        assert (metrics["rows"], metrics["rows_error"]) == (metrics["rows_ok"] + 2, 2)
        assert not self.requested & set(known)
        assert {row: data for row, data in self.committed().items() if row in known} == known
        if set(whole) == set(OUTPUTS) and self.written == self.prefix and not grown:
            assert self.content() == whole
        self.written = self.prefix

    @precondition(lambda self: self.flipped is None)
    @rule(number=st.integers(1, STEPS), done=st.booleans(), again=st.booleans())
    def kill(self, number: int, done: bool, again: bool) -> None:
        known, corpse, self.written = self.committed(), self.root / "corpse", None

        steps = []

        def act(step: int, kind: str, is_done: bool) -> None:
            steps.extend([kind] if kind != "write" and not is_done else [])
            if kind != "write" and (len(steps), is_done) == (number, done):
                shutil.copytree(self.directory, corpse)
                raise Killed

        try:
            with durable_steps(self.directory, act):
                self.start(self.directory)
        except (Killed, LedgerError):
            if corpse.exists():  # what was done while the exception went its way, no dead process does
                shutil.rmtree(self.directory, ignore_errors=True)
                corpse.rename(self.directory)
        if self.goes_on and self.rows_noted() == sum(map(bool, self.rows)):
            self.asked = self.asks
        now = self.committed()
        assert {row: now.get(row) for row in known} == known
        if again:
            self.run()

    @rule()
    def change_config(self) -> None:
        self.seed = 1 - self.seed

    @rule()
    def ask_for_other_names_of_the_columns(self) -> None:
        self.prefix = "" if self.prefix else "llm_"

    @rule()
    def append_to_dataset(self) -> None:
        self.rows = [*self.rows, f'{{"id": "more {len(self.rows)}", "prompt": "x"}}']

    @precondition(lambda self: self.asked is not None)
    @rule()
    def ask_again_what_was_asked(self) -> None:
        self.seed, self.rows = self.asked

    @precondition(lambda self: self.flipped is None and (self.directory / FILE).exists())
    @rule(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def damage_ledger(self, where: float, bit: int) -> None:
        self.committed()  # moves what the journal holds into the file
        self.flip(self.directory / FILE, where, bit)

    @precondition(lambda self: self.flipped is None and self.content())
    @rule(name=st.sampled_from(OUTPUTS), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def damage_output(self, name: str, where: float, bit: int) -> None:
        if self.asked is not None and (self.directory / name).exists():
            self.flip(self.directory / name, where, bit)

    @precondition(lambda self: self.flipped)
    @rule()
    def undo_damage(self) -> None:
        path, data = self.flipped
        path.write_bytes(data)
        self.flipped = None

    @precondition(lambda self: self.flipped is None)
    @rule()
    def lose_ledger(self) -> None:
        for path in self.directory.glob(f"{FILE}*"):
            path.unlink()
        self.asked = None

    @precondition(lambda self: self.flipped is None)
    @rule(name=st.sampled_from(OUTPUTS))
    def move_output_away(self, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)

    # --- what is looked at ----------------------------------------------------------------------------------------

    @property
    def asks(self) -> Any:
        return self.seed, self.rows

    @property
    def goes_on(self) -> bool:
        """Whether a run that is there, if any, was asked the same, of the same rows or the first of them."""
        seed, rows = self.asked or self.asks
        return bool(seed == self.seed and rows == self.rows[: len(rows)])

    def start(self, directory: Path) -> dict[str, Any]:
        path = self.root / "rows.jsonl"
        path.write_text("\n".join(self.rows) + "\n")
        dataset, output = replace(self.base.dataset, path=str(path)), replace(self.base.output, prefix=self.prefix)
        config = replace(self.base, seed=self.seed, dataset=dataset, output=output)
        stream, requested = EchoRunner.stream, self.requested

        def noting(self: EchoRunner, given: Iterable[Request]) -> Iterator[Chunk]:
            for chunk in stream(self, given):
                requested.add(chunk.request_id)
                yield chunk

        clock = itertools.count()
        with (
            patch.object(EchoRunner, "stream", noting),
            patch("llmpipe.ledger.writing.COMMIT_EVERY_ROWS", 3),
            # So that the same history leaves the same bytes (hence the one root, too), and damages the same place when
            # it is told again: else Hypothesis finds its own findings gone.
            patch("llmpipe.ledger.writing.COMMIT_EVERY_S", 1e9),
            patch("time.perf_counter", lambda: next(clock) / 1024),
            patch("llmpipe.system.memory.own_rss_bytes", lambda: 2**26),
            patch("llmpipe.attempt.utc_now", lambda: "2026-01-31T12:00:00+00:00"),
        ):
            return llmpipe.run(config, directory)

    def undisturbed(self) -> list[dict[str, Any]]:
        key = json.dumps(self.asks)
        if key not in self.expected:
            requested, self.requested = self.requested, set()
            self.start(self.root / "undisturbed")
            self.requested = requested
            self.expected[key] = answers(self.root / "undisturbed")
            shutil.rmtree(self.root / "undisturbed")
        return self.expected[key]

    def content(self) -> dict[str, bytes]:
        return {name: (self.directory / name).read_bytes() for name in OUTPUTS if (self.directory / name).exists()}

    def committed(self) -> dict[int, bytes]:
        return dict(self.look("SELECT row, data FROM completions"))

    def rows_noted(self) -> int | None:
        """Return how many rows the ledger knows the dataset to have."""
        found = self.look("SELECT value FROM meta WHERE key = 'fingerprint'")
        return json.loads(found[0][0])["dataset"]["rows"] if found else None

    def look(self, query: str) -> list[Any]:
        if self.flipped or not (self.directory / FILE).exists():
            return []
        with closing(sqlite3.connect(self.directory / FILE)) as db:
            tables = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
            return db.execute(query).fetchall() if tables else []

    def flip(self, path: Path, where: float, bit: int) -> None:
        data = path.read_bytes()
        if data:
            changed, used = bytearray(data), [place for place, byte in enumerate(data) if byte]
            changed[used[int(where * len(used))]] ^= 1 << bit
            path.write_bytes(changed)
            self.flipped = path, data


def answers(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "outputs.jsonl").read_bytes().splitlines()
    return [{k.removeprefix("llm_"): v for k, v in json.loads(one).items() if not k.endswith("_s")} for one in lines]


@pytest.mark.parametrize("done", [False, True])
def test_a_run_and_the_writing_of_its_files_under_other_names_may_be_killed_at_each_step(done: bool) -> None:
    for number in range(1, STEPS + 1):
        runs = Runs()
        runs.begin()
        runs.kill(number, done, again=True)
        runs.ask_for_other_names_of_the_columns()
        runs.kill(number, done, again=True)
        runs.teardown()


class TestRuns(Runs.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=60, stateful_step_count=12, deadline=None)


@pytest.mark.slow
class TestManyRuns(Runs.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=300, stateful_step_count=40, deadline=None)

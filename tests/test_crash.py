"""Killed at any instant, on any faulty disk: no row is lost, none is done twice, and a resumed run ends as it should.

The method is SQLite's: real runs in processes of their own, which are killed at random moments and at each step that
makes something durable, or are told there that the disk is full; then what is on the disk has to do.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from crashes import SIGKILL, Case, check_kept, committed, small_rows
from faults import Children, durable_steps

import llmpipe

SEED = int(os.environ.get("LLMPIPE_CRASH_SEED", random.randrange(2**32)))
"""Of all that is random here; a test that fails names it."""


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    server = Children()
    yield server
    server.close()


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> Iterator[random.Random]:
    yield random.Random(f"{SEED} {request.node.name}")
    print(f"LLMPIPE_CRASH_SEED={SEED}")  # pytest shows it where the test has failed


@pytest.fixture(params=["jsonl", "parquet"])
def small(request: pytest.FixtureRequest, children: Children, tmp_path: Path) -> Case:
    return Case(children, tmp_path, small_rows(), "backend=echo", f"output={request.param}", rows_per_commit=5)


def check_killed(case: Case, chance: random.Random, kills: int, **first: Any) -> None:
    """Kill a run as told, then its resumptions anywhere, and see that what is left suffices."""
    directory, known = case.new_directory(), {}
    for kill in [first, *({"kill": step(case, chance)} for _ in range(kills - 1))]:
        done = case.run(directory, **kill)
        assert done["exit"] in (SIGKILL, case.code), (kill, done)  # a resumption has fewer steps
        known = check_kept(directory, known)
    case.check_end(directory, known)


def step(case: Case, chance: random.Random) -> tuple[int, bool]:
    return chance.randint(1, case.steps), chance.random() < 0.5


# --- killed -----------------------------------------------------------------------------------------------------------


def test_a_run_killed_at_random_durable_steps_ends_like_one_that_was_not(small: Case, chance: random.Random) -> None:
    check_killed(small, chance, 2, kill=step(small, chance))


@pytest.mark.slow
def test_a_run_killed_before_or_after_each_durable_step_ends_like_one_that_was_not(
    small: Case, chance: random.Random
) -> None:
    for number in range(1, small.steps + 1):
        for done in (False, True):
            check_killed(small, chance, 2, kill=(number, done))


def big(children: Children, root: Path) -> Case:
    rows = [b'{"id": "row %d", "prompt": "%d"}' % (i, i) for i in range(8_000)]
    return Case(children, root, rows, "backend=echo", rows_per_commit=500)


def real(children: Children, root: Path) -> Case:
    rows = (Path(llmpipe.__file__).parent.parent / "data" / "questions.jsonl").read_bytes().splitlines()[:60]
    model = ["backend=llama_cpp", "backend.reproducible=true", "backend.threads=1", "sampling=balanced"]
    return Case(children, root, rows, *model, "sampling.max_tokens=24", rows_per_commit=5)


@pytest.mark.parametrize(
    ("make", "kills"), [(big, 2), (real, 4), *(pytest.param(make, 30, marks=pytest.mark.slow) for make in (big, real))]
)
def test_a_run_killed_at_random_moments_ends_like_one_that_was_not(
    children: Children, tmp_path: Path, chance: random.Random, make: Any, kills: int
) -> None:
    case, killed = make(children, tmp_path), 0
    longest = case.seconds
    while killed < kills:
        directory, known = case.new_directory(), {}
        for _ in range(2):
            done = case.run(directory, kill_after_s=chance.uniform(0.05, longest))
            assert done["exit"] in (SIGKILL, case.code), done
            known = check_kept(directory, known)
            killed += done["exit"] == SIGKILL
            longest *= 1 if done["exit"] == SIGKILL else 0.8  # the machine was slower when it was measured
        case.check_end(directory, known)


def write_as(rows: list[dict[str, Any]], file: Path) -> Path:
    """Write rows in the format that a file's name tells."""
    format = (file.with_suffix("") if file.suffix in (".gz", ".zst") else file).suffix
    text = io.StringIO()
    if format in (".csv", ".tsv"):
        writer = csv.DictWriter(text, list(rows[0]), delimiter="," if format == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
    elif format == ".json":
        json.dump(rows, text)
    else:
        text.writelines(json.dumps(row) + "\n" for row in rows)
    if format == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=5)
    elif file.suffix != format:
        pack = gzip.compress if file.suffix == ".gz" else zstandard.compress
        file.write_bytes(pack(text.getvalue().encode()))
    else:
        file.write_text(text.getvalue())
    return file


INPUTS = "jsonl jsonl.gz jsonl.zst ndjson csv csv.gz tsv json json.gz parquet".split()


@pytest.mark.slow
@pytest.mark.parametrize("output", ["jsonl", "parquet"])
@pytest.mark.parametrize("input", INPUTS)
def test_runs_of_every_pair_of_formats_killed_at_random_lose_double_and_change_no_row(
    children: Children, tmp_path: Path, chance: random.Random, input: str, output: str
) -> None:
    """Ten kills of each pair: in all, 200."""
    lines = (Path(llmpipe.__file__).parent.parent / "data" / "questions.jsonl").read_bytes().splitlines()[:24]
    rows = [{"id": f"row {i}", "prompt": json.loads(line)["prompt"], "note": "é,\n"} for i, line in enumerate(lines)]
    dataset = write_as(rows, tmp_path / f"rows.{input}")
    model = ["backend=llama_cpp", "backend.reproducible=true", "backend.threads=1", "sampling=balanced"]
    model += ["sampling.max_tokens=24", f"output={output}"]
    kills = amid = 0
    for n, isolation, wanted in ((1, "false", 3), (1, "true", 5), (3, "false", 8), (3, "true", 10)):
        root = tmp_path / f"{n} {isolation}"
        root.mkdir()
        options = [f"sampling.n={n}", f"backend.isolation={isolation}"]
        case = Case(children, root, dataset, *model, *options, rows_per_commit=3)
        if isolation == "false":
            expected = case.expected
        assert case.expected == expected
        longest = case.seconds
        while kills < wanted:
            directory, known = case.new_directory(), {}
            for _ in range(2):
                done = case.run(directory, kill_after_s=chance.uniform(0.1, longest))
                known = check_kept(directory, known)
                if done["exit"] != SIGKILL:
                    assert done["exit"] == case.code, done
                    longest *= 0.8  # the machine was slower when it was measured
                    break
                kills += 1
                amid += 0 < len(known) < len(rows) * n
            case.check_end(directory, known)
    print(f"{kills} kills, {amid} of them when some rows were done and others were not")


def test_a_damaged_journal_loses_answers_but_never_changes_one(small: Case, chance: random.Random) -> None:
    directory = small.new_directory()
    assert small.run(directory, kill=(small.steps // 2, True))["exit"] == SIGKILL
    journal = directory / "ledger.sqlite-wal"
    data = bytearray(journal.read_bytes())
    data[chance.randrange(len(data) // 2, len(data))] ^= 1 << chance.randrange(8)
    journal.write_bytes(data)
    small.check_end(directory, {})


# --- faulty disks -----------------------------------------------------------------------------------------------------


def check_fault(case: Case, **fault: Any) -> None:
    """See that a run on a faulty disk says so in a line and loses nothing, and that it ends when the disk is whole."""
    directory = case.new_directory()
    done = case.run(directory, **fault)
    assert done["exit"] == 1, (fault, done)
    assert re.fullmatch(r"llmpipe: cannot .+\n", done["said"]), (fault, done)
    assert str(directory) in done["said"] and "move it away" not in done["said"], (fault, done)
    known = committed(directory)
    case.check_end(directory, known)


FAULTS = ["ENOSPC", "EIO", "EROFS"]


def test_a_disk_that_turns_faulty_ends_the_run_with_a_line_and_loses_nothing(
    small: Case, chance: random.Random
) -> None:
    check_fault(small, fault=(chance.randint(1, small.steps), chance.choice(FAULTS)))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_disk_that_turns_faulty_at_any_step_ends_the_run_with_a_line_and_loses_nothing(
    small: Case, name: str
) -> None:
    for number in range(1, small.steps + 1):
        check_fault(small, fault=(number, name))


def test_a_system_that_refuses_to_write_ends_the_run_with_a_line_and_loses_nothing(
    children: Children, tmp_path: Path
) -> None:
    case = Case(children, tmp_path, small_rows(200), "backend=echo", rows_per_commit=7)
    check_fault(case, most_bytes=60_000)


# --- the order of things ----------------------------------------------------------------------------------------------


def test_files_are_synced_before_they_have_their_names_and_the_names_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash of the machine, unlike one of the process, takes what was not synced."""
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(small_rows()))
    config = llmpipe.compose(["backend=echo", f"dataset.path={tmp_path / 'rows.jsonl'}"])
    kinds: list[str] = []
    with durable_steps(tmp_path / "run", lambda number, kind, done: kinds.append(kind) if done else None):
        llmpipe.run(config, tmp_path / "run")
    assert kinds[:5] == ["open", "fsync", "replace", "fsync", "commit"]  # of the ledger
    end = kinds[kinds.index("open", 1) :]
    assert [kind for kind in end if kind != "write"] == [
        *["open"] * 4,
        "commit",  # of the peak memory, which writing belongs to
        *["fsync"] * 4,
        "commit",
        *["replace"] * 4,
        "fsync",
    ]
    assert end.index("fsync") > max(i for i, kind in enumerate(end) if kind == "write")

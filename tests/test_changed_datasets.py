"""A dataset that is changed while it is read: nothing comes of the other text, not even if it is put back meanwhile."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import llmpipe
from llmpipe import DatasetError, LedgerError
from llmpipe.config import DatasetConfig
from llmpipe.datasets import Dataset, contents
from llmpipe.export import export
from llmpipe.ledger import FILE, LedgerSnapshot, saved
from llmpipe.outputs import WRITERS
from llmpipe.plan import plan
from llmpipe.preflight import look_through
from llmpipe.progress import Progress, Watch
from llmpipe.records import Row

Compose = Callable[..., llmpipe.RunConfig]
Change = Callable[..., None]

ROWS = 60
PROMPTS = [f"row {i}" for i in range(ROWS)]
OTHER = [f"other {i}" for i in range(ROWS)]
FILLER = "filler " * 1000
"""Makes a file too long for any reader to take it in at once."""


@pytest.fixture(scope="module")
def echo() -> llmpipe.RunConfig:
    return llmpipe.compose(["backend=echo"])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "BLOCK_BYTES", 2**16)


def text_of(prompts: list[str], suffix: str = ".jsonl") -> bytes:
    rows = [{"prompt": prompt, "filler": f"{FILLER}{prompt}"} for prompt in prompts]
    if suffix == ".csv":
        return "\n".join(["prompt,filler", *(",".join(row.values()) for row in rows)]).encode()
    return (
        json.dumps(rows, indent=1).encode() if suffix == ".json" else b"\n".join(json.dumps(r).encode() for r in rows)
    )


def write(path: Path, prompts: list[str], in_place: bool = True) -> None:
    """Write rows to a file in the format that its name says; if not in place, then as another file of that name."""
    new = path if in_place else path.with_name("new")
    if path.suffix == ".parquet":
        table = pa.table({"prompt": prompts, "filler": [f"{FILLER}{prompt}" for prompt in prompts]})
        pq.write_table(table, new, row_group_size=7)
    else:
        pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
        new.write_bytes(pack(text_of(prompts, path.suffix)))
    os.replace(new, path)


def answers(directory: Path) -> list[str]:
    """Return what the ledger holds, by row and sample."""
    with closing(LedgerSnapshot(directory)) as ledger:
        return [str(completion.text) for completion in ledger.completions()]


def when(number: int, change: Change) -> Watch:
    """Return what calls `change` when a run has so many answers."""
    waiting = [change]
    return lambda progress: waiting.pop()() if waiting and progress.done == number else None


def then(function: Any, change: Change) -> Any:
    """Return the function, after which `change` is called."""

    def called(*args: Any, **options: Any) -> Any:
        found = function(*args, **options)
        change()
        return found

    return called


# --- the run that a breaker broke -------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolation", [False, True])
def test_a_dataset_overwritten_while_a_process_runs_it_and_put_back_gives_no_answer_to_the_other_text(
    tmp_path: Path, isolation: bool
) -> None:
    prompts = [f"Row {i} {'x' * 2000}" for i in range(1200)]
    text = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    (tmp_path / "conf/backend").mkdir(parents=True)
    options = {"_target_": "breaking.Breaking", "load": "slow", "held": 20, "isolation": isolation}
    (tmp_path / "conf/backend/breaking.yaml").write_text(json.dumps(options))
    path, run = tmp_path / "rows.jsonl", tmp_path / "run"
    path.write_text(text)
    command = [sys.executable, "-m", "llmpipe", f"--config-dir={tmp_path / 'conf'}", "backend=breaking"]
    command += [f"dataset.path={path}", f"hydra.run.dir={run}", "trusted_modules=[breaking]"]
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 60
    while not ((run / FILE).exists() and saved(run, "load_s") != [None] and answers(run)):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)
    with path.open("r+") as file:
        file.write(text.replace("Row", "Cow"))
    said = process.communicate(timeout=60)[0]
    with path.open("r+") as file:
        file.write(text)
    assert process.returncode == 1
    assert "rows.jsonl was changed while it was read: of its rows that are run, " in said
    assert 0 < len(answers(run)) < 1200
    resumed = subprocess.run(command, env=environment, capture_output=True)
    assert resumed.returncode == 0, resumed.stderr
    assert answers(run) == [prompt.upper() for prompt in prompts]


# --- any change at any time -------------------------------------------------------------------------------------------

EDITS: dict[str, Callable[[list[str], int], list[str]]] = {
    "change": lambda rows, i: [*rows[:i], "other", *rows[i + 1 :]],
    "remove": lambda rows, i: rows[:i] + rows[i + 1 :],
    "insert": lambda rows, i: [*rows[:i], "other", *rows[i:]],
    "swap": lambda rows, i: [*rows[:i], *reversed(rows[i:])],
    "cut": lambda rows, i: rows[:i],
    "replace": lambda rows, i: OTHER,
    "append": lambda rows, i: [*rows, "other"],
    "restore": lambda rows, i: PROMPTS,
}
Changes = list[tuple[int, str, int, bool]]
"""After how many answers, what, at which row, and whether in place."""
CHANGES: st.SearchStrategy[Changes] = st.lists(
    st.tuples(st.integers(1, 2 * ROWS), st.sampled_from(sorted(EDITS)), st.integers(0, ROWS - 1), st.booleans()),
    min_size=1,
    max_size=4,
)


RUNS = st.fixed_dictionaries(
    {
        "suffix": st.sampled_from([".jsonl", ".gz", ".zst", ".json", ".csv", ".parquet"]),
        "output": st.sampled_from(sorted(WRITERS)),
        "shuffle": st.none() | st.integers(0, 3),
        "offset": st.integers(0, 9),
        "limit": st.none() | st.integers(1, ROWS),
        "samples": st.integers(1, 2),
    }
)


@given(RUNS, CHANGES)
@settings(max_examples=12, deadline=None)
def test_whatever_is_changed_whenever_a_run_holds_answers_to_the_text_it_began_with_and_can_be_finished(
    tmp_path_factory: pytest.TempPathFactory, echo: llmpipe.RunConfig, options: dict[str, Any], changes: Changes
) -> None:
    check_changed_run(tmp_path_factory.mktemp("changed"), echo, changes, **options)


@pytest.mark.slow
@given(RUNS, CHANGES)
@settings(max_examples=1000, deadline=None)
def test_many_changes_at_many_times(
    tmp_path_factory: pytest.TempPathFactory, echo: llmpipe.RunConfig, options: dict[str, Any], changes: Changes
) -> None:
    check_changed_run(tmp_path_factory.mktemp("changed"), echo, changes, **options)


def check_changed_run(
    directory: Path,
    echo: llmpipe.RunConfig,
    changes: Changes,
    suffix: str,
    output: str,
    shuffle: int | None,
    offset: int,
    limit: int | None,
    samples: int,
) -> None:
    path, run = directory / f"rows{suffix}", directory / "run"
    write(path, PROMPTS)
    config = replace(
        echo,
        dataset=DatasetConfig(path=str(path), shuffle=shuffle, offset=offset, limit=limit),
        sampling=echo.sampling.replace({"n": samples}),
        output=replace(echo.output, format=output),
    )
    chosen = [str(row.values["prompt"]) for row in Dataset(config.dataset).rows()]
    expected = [prompt for prompt in chosen for _ in range(samples)]
    now, last = PROMPTS, 0

    def change(progress: Progress) -> None:
        nonlocal now, last
        if progress.done == last:
            return
        last = progress.done
        for number, edit, i, in_place in changes:
            if number == progress.done:
                now = EDITS[edit](now, i)
                write(path, now, in_place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contents, "BLOCK_BYTES", 2**16)
        patch.setattr("llmpipe.datasets.shuffle.WINDOW_ROWS", 16)
        try:
            llmpipe.run(config, run, progress=change)
        except DatasetError as error:
            assert str(path) in str(error)
            assert "was changed while it was read" in str(error) or "cannot be read" in str(error)
            assert not (run / f"outputs.{output}").exists()
            found = answers(run)
            assert found == expected[: len(found)]
        write(path, PROMPTS)
        llmpipe.run(config, run)
    rows = llmpipe.read_run(run).rows
    assert answers(run) == expected == rows["prompt"].tolist() == rows["completion"].tolist()
    assert rows["filler"].tolist() == [f"{FILLER}{prompt}" for prompt in expected]


# --- growth while a run goes on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", ["null", "3"])
@pytest.mark.parametrize("grown", [0, 1])
def test_rows_that_are_appended_while_a_run_goes_on_do_not_disturb_it(
    tmp_path: Path, echo_config: Compose, small_blocks: None, grown: int, shuffle: str
) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    write(paths[0], PROMPTS[:40]), write(paths[1], PROMPTS[40:])
    config = echo_config(tmp_path / "*.jsonl", f"dataset.shuffle={shuffle}")

    def grow() -> None:
        with paths[grown].open("ab") as file:
            file.write(b'\n{"prompt": "new"}\n{"prom')

    metrics = llmpipe.run(config, tmp_path / "run", progress=when(1, grow))
    assert metrics["rows"] == ROWS and sorted(answers(tmp_path / "run")) == sorted(PROMPTS)
    with paths[grown].open("ab") as file:
        file.write(b'pt": "newer"}')
    if grown and shuffle == "null":  # then these are rows after those of before
        assert llmpipe.run(config, tmp_path / "run")["rows"] == ROWS + 2
        assert answers(tmp_path / "run") == [*PROMPTS, "new", "newer"]
    else:
        with pytest.raises(LedgerError, match=r"dataset\.digest was"):
            llmpipe.run(config, tmp_path / "run")


def test_a_row_that_comes_just_after_the_first_look_leaves_a_run_that_can_be_finished(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl({"prompt": "a"}, {"prompt": "b"})

    def grow() -> None:
        with path.open("a") as file:
            file.write('{"prompt": "c"}\n')

    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "_check_ids", then(Dataset._check_ids, grow))
        assert llmpipe.run(echo_config(path), tmp_path / "run")["rows"] == 2
    assert llmpipe.run(echo_config(path), tmp_path / "run")["rows"] == 3
    assert answers(tmp_path / "run") == ["a", "b", "c"]


def test_a_last_line_that_was_not_finished_is_a_changed_row_once_it_is(
    tmp_path: Path, echo_config: Compose, small_blocks: None
) -> None:
    path = tmp_path / "rows.csv"
    write(path, PROMPTS)
    before = path.read_bytes()
    with pytest.raises(DatasetError, match=f"rows.csv was changed.* to {ROWS} are not what they were"):
        llmpipe.run(echo_config(path), tmp_path / "run", progress=when(1, lambda: path.write_bytes(before + b" more")))
    path.write_bytes(before)
    assert llmpipe.run(echo_config(path), tmp_path / "run")["rows_ok"] == ROWS


# --- what it says, and what it leaves ---------------------------------------------------------------------------------


def test_a_change_is_named_by_file_and_rows_and_what_was_finished_stays(
    tmp_path: Path, echo_config: Compose, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    parts = [PROMPTS[:10], PROMPTS[10:50], PROMPTS[50:]]
    for path, prompts in zip(paths, parts, strict=True):
        write(path, prompts)
    config = echo_config(tmp_path / "*.jsonl")
    said = (
        r"b\.jsonl was changed while it was read: of its rows that are run, 31 to 35 are not what they were\. Nothing"
    )
    with pytest.raises(DatasetError, match=said):
        llmpipe.run(config, tmp_path / "run", progress=when(1, lambda: write(paths[1], [*parts[1][:31], *parts[2]])))
    assert answers(tmp_path / "run") == PROMPTS[:40]
    with pytest.raises(LedgerError, match=r"dataset\.digest was .*b\.jsonl has other rows than before"):
        llmpipe.run(config, tmp_path / "run")
    write(paths[1], parts[1])
    cut = when(41, lambda: write(paths[1], parts[1][:20], in_place=False))  # seen when the answers are written
    with pytest.raises(DatasetError, match=r"b\.jsonl was changed while it was read: it has 20 of its 40 rows\. No"):
        llmpipe.run(config, tmp_path / "run", progress=cut)
    assert answers(tmp_path / "run") == PROMPTS
    write(paths[1], parts[1])
    monkeypatch.setattr("llmpipe.pipeline.look_through", then(look_through, paths[2].unlink))
    with pytest.raises(DatasetError, match=r"c\.jsonl cannot be read to its end: .*No such file"):
        llmpipe.run(config, tmp_path / "run")


def test_rows_that_are_done_are_compared_too(tmp_path: Path, echo_config: Compose, small_blocks: None) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, PROMPTS)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llmpipe.run(echo_config(path), tmp_path / "run", progress=when(50, stop))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "_check_ids", then(Dataset._check_ids, lambda: write(path, ["x", *PROMPTS[1:]])))
        with pytest.raises(DatasetError, match="1 to 5 are not what they were"):
            llmpipe.run(echo_config(path), tmp_path / "run")
    assert answers(tmp_path / "run") == PROMPTS[:50]


def test_the_copy_of_a_stream_is_compared_as_files_are(
    tmp_path: Path, echo_config: Compose, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    source.write_bytes(text_of(PROMPTS))
    with source.open("rb") as stream:
        config = echo_config(f"/dev/fd/{stream.fileno()}", "dataset.format=jsonl")
        monkeypatch.setattr("llmpipe.datasets.inputs._spent", set())
        with pytest.raises(DatasetError, match=r"\.input-0 was changed while it was read"):
            llmpipe.run(config, run, progress=when(1, lambda: (run / ".input-0").write_bytes(text_of(OTHER))))
    (run / ".input-0").write_bytes(text_of(PROMPTS))
    llmpipe.run(config, run, resumed=True)
    assert answers(run) == PROMPTS


@pytest.mark.parametrize(
    ("backend", "isolation"), [("llama_cpp", "false"), ("llama_cpp", "true"), ("transformers", "false")]
)
def test_a_backend_that_looks_ahead_gives_up_where_the_next_block_is_another(
    tmp_path: Path, backend: str, isolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "BLOCK_BYTES", 1)  # each row is a block
    path, run = tmp_path / "rows.jsonl", tmp_path / "run"
    write(path, PROMPTS[:20])
    options = ["device=cpu", "sampling=greedy", "sampling.max_tokens=3", "backend.slots=2"]
    options += [f"backend={backend}", f"backend.isolation={isolation}", f"dataset.path={path}"]
    config = llmpipe.compose(options)
    with pytest.raises(DatasetError, match="was changed while it was read"):
        llmpipe.run(config, run, progress=when(1, lambda: write(path, OTHER)))
    done = len(answers(run))
    write(path, PROMPTS[:20])
    assert 0 < done < 20 and llmpipe.run(config, run)["rows_ok"] == 20


# --- other ways to read rows ------------------------------------------------------------------------------------------


def test_rows_are_those_that_were_looked_through_wherever_they_are_read_again(
    tmp_path: Path, echo_config: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = tmp_path / "rows.jsonl", tmp_path / "run"
    config, changing = echo_config(path), then(look_through, lambda: write(path, OTHER))
    starts: list[tuple[str, Callable[..., Any]]] = [("plan", plan), ("pipeline", llmpipe.run), ("export", export)]
    for module, start in starts:
        write(path, PROMPTS)
        if start is export:
            llmpipe.run(config, run)
        with monkeypatch.context() as patch, pytest.raises(DatasetError, match="was changed while it was read"):
            patch.setattr(f"llmpipe.{module}.look_through", changing)
            start(config, run)
        assert not (run / "partial.jsonl" if start is export else run).exists()


def test_ids_that_stand_twice_are_found_though_another_text_is_there_when_they_are_sought(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n')

    def change(row: Row) -> None:
        if row.line == 2:
            path.write_text('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 2}\n')

    with pytest.raises(DatasetError, match="was changed while it was read"):
        Dataset(DatasetConfig(path=str(path))).scan(look=change)


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_a_block_is_bounded_by_rows_and_bytes_so_that_long_rows_are_not_held_together() -> None:
    def sizes(length: int, rows: int) -> list[int]:
        found = contents.Contents().note(Row("a", i, raw=b"x" * length, index=i) for i in range(rows))
        return [len(block) for block in found]

    assert sizes(0, 1100) == [512, 512, 76]
    assert max(sizes(2**16, 100)) < 64 and max(sizes(2**20, 10)) == 4 and max(sizes(2**23, 3)) == 1


@pytest.mark.parametrize(
    ("shuffle", "digest"), [(None, "aba23d871deb7e6f7a2d39ad1816269a"), (1, "82800f64dd907565db6486db832c91cc")]
)
def test_a_digest_stays_what_it_was_so_that_runs_of_other_versions_can_be_resumed(
    tmp_path: Path, shuffle: int | None, digest: str
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{bad\n')
    (tmp_path / "b.csv").write_text("prompt,n\nb,1\né,\n")
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv")]
    assert Dataset(DatasetConfig(path=paths, shuffle=shuffle)).scan().digest == digest

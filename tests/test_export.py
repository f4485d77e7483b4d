"""`llmpipe export` gives what a run has so far: while it goes on, after it was killed, and when it is done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import llmpipe
from llmpipe import DatasetError, LedgerError, LLMConfigError, LLMError, RunConfig
from llmpipe.datasets import Dataset
from llmpipe.export import export
from llmpipe.fingerprint import fingerprint
from llmpipe.ledger import Ledger, LedgerSnapshot
from llmpipe.outputs import own_file
from llmpipe.plan import plan
from llmpipe.records import Completion, failed

LLMPIPE = [sys.executable, "-m", "llmpipe"]


def run_llmpipe(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LLMPIPE, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in lines(path)]


def test_answers_of_a_running_and_of_a_killed_run_are_there_and_the_run_goes_on_from_them(
    write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_jsonl(*({"id": i, "prompt": f"Tell me a story about number {i}."} for i in range(300)))
    asked = ["sampling.max_tokens=12", "sampling.ignore_eos=true", "backend.slots=2", "backend.threads=1"]
    config = llmpipe.compose([*asked, f"dataset.path={path}"])
    child = subprocess.Popen(
        [*LLMPIPE, *asked, f"dataset.path={path}", "hydra.run.dir=out"], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    try:
        out, deadline = tmp_path / "out", time.monotonic() + 30
        while_running = None
        while not (while_running and while_running.rows) and time.monotonic() < deadline:
            time.sleep(0.1)
            if (out / "ledger.sqlite-wal").exists():  # before, a run at rest goes on, and asks for it once more
                while_running = export(config, out)
        assert child.poll() is None, "it ended too soon to be looked at"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert while_running is not None
    seen = lines(out / "partial.jsonl")
    assert 0 < while_running.rows == len(seen) < while_running.of == 300

    before = {file.name: file.read_bytes() for file in out.rglob("*") if file.is_file() and "-shm" not in file.name}
    killed = run_llmpipe("export", "out", "--to", "killed.parquet", cwd=tmp_path)
    assert killed.returncode == 0, killed.stderr
    table = pq.read_table(tmp_path / "killed.parquet")
    assert f"{table.num_rows} of 300 rows\nkilled.parquet" in killed.stdout
    assert {file.name: file.read_bytes() for file in out.rglob("*") if file.name in before} == before
    assert {file.name for file in out.rglob("*") if file.is_file()} == {*before, "ledger.sqlite-shm"}

    assert run_llmpipe("resume", "out", cwd=tmp_path).returncode == 0
    final = lines(out / "outputs.jsonl")
    assert len(final) == 300
    whole = set(final)
    assert all(line in whole for line in seen), "what was exported is what the run ends with, times included"
    assert ids(out / "partial.jsonl") == sorted(ids(out / "partial.jsonl"))
    texts = {row["id"]: row["completion"] for row in map(json.loads, final)}
    assert [texts[i] for i in table["id"].to_pylist()] == table["completion"].to_pylist()
    assert len(seen) <= table.num_rows


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_an_export_of_a_finished_run_is_its_output_and_leaves_no_traces(
    format: str, write_jsonl: Callable[..., Path], tmp_path: Path, echo_config: Callable[..., RunConfig]
) -> None:
    path = write_jsonl({"id": "a", "prompt": "x y", "reference": "x y"}, b"not json", {"prompt": "z", "more": [1]})
    config = echo_config(path, "sampling.n=2", f"output={format}", "output.prefix=llm_")
    llmpipe.run(config, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    exported = export(config, tmp_path / "out", tmp_path / f"copy.{format}")
    assert (exported.rows, exported.of) == (3, 3)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    if format == "jsonl":
        assert exported.path.read_bytes() == before["outputs.jsonl"]
    else:
        assert pq.read_table(exported.path).equals(pq.read_table(tmp_path / "out" / "outputs.parquet"))


def test_only_rows_with_all_their_samples_are_exported(
    write_jsonl: Callable[..., Path], tmp_path: Path, echo_config: Callable[..., RunConfig]
) -> None:
    path = write_jsonl(
        {"id": "half", "prompt": "x"},
        {"id": "bad", "prompt": 5},
        {"id": "none", "prompt": "x"},
        {"id": "all", "prompt": "x"},
        {"id": "one", "prompt": "x", "sampling": {"n": 1}},
    )
    config = echo_config(path, "sampling.n=2")
    with Ledger(tmp_path / "out", fingerprint(config, Dataset(config.dataset).scan())) as ledger:
        ledger.add([Completion(0, 1, "a"), failed(1, "bad"), Completion(3, 0, "b"), Completion(3, 1, "c")])
        ledger.add([Completion(4, 0, "d")])
        ledger.commit()
        first = export(config, tmp_path / "out", tmp_path / "first.jsonl")  # while its owner has it open
        ledger.add([Completion(0, 0, "e")])
        ledger.commit()
        second = export(config, tmp_path / "out", tmp_path / "second.jsonl")
    assert (first.rows, first.of, second.rows) == (3, 5, 4)
    assert ids(first.path) == ["bad", "all", "all", "one"]
    assert ids(second.path) == ["half", "half", "bad", "all", "all", "one"]


def test_a_ledger_is_read_as_it_was_when_the_export_began(
    write_jsonl: Callable[..., Path], tmp_path: Path, echo_config: Callable[..., RunConfig]
) -> None:
    with Ledger(tmp_path, {}) as ledger:
        ledger.add([Completion(0, 0, "a")])
        ledger.commit()
        with LedgerSnapshot(tmp_path) as snapshot:
            ledger.add([Completion(1, 0, "b")])
            ledger.commit()
            assert (snapshot.count(), ledger.count()) == (1, 2)


def test_a_run_at_rest_that_goes_on_while_it_is_exported_is_to_be_exported_once_more_and_not_damaged(
    write_jsonl: Callable[..., Path],
    tmp_path: Path,
    echo_config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, out = echo_config(write_jsonl(*({"prompt": str(i)} for i in range(3)))), tmp_path / "out"
    asked = fingerprint(config, Dataset(config.dataset).scan())
    with Ledger(out, asked) as ledger:
        ledger.add([Completion(0, 0, "a"), Completion(1, 0, "b")])
        ledger.commit()
    read = LedgerSnapshot._verified

    def read_while_the_run_goes_on(self: LedgerSnapshot) -> Any:
        yield from read(self)
        with Ledger(out, asked) as resumed:
            resumed.add([Completion(2, 0, "c")])
            resumed.commit()

    monkeypatch.setattr(LedgerSnapshot, "_verified", read_while_the_run_goes_on)
    with pytest.raises(LedgerError, match="went on while this was reading it: do it once more"):
        export(config, out, tmp_path / "export.jsonl")
    assert not (tmp_path / "export.jsonl").exists()
    monkeypatch.undo()
    assert export(config, out, tmp_path / "export.jsonl").rows == 3


def test_what_cannot_be_exported_is_refused_with_the_reason(
    write_jsonl: Callable[..., Path], tmp_path: Path, echo_config: Callable[..., RunConfig]
) -> None:
    path = write_jsonl({"prompt": "x"})
    config = echo_config(path)
    llmpipe.run(config, tmp_path / "out")
    for name, said in (("answers.csv", "must end in .jsonl or .parquet"), ("out/outputs.parquet", "the run's own")):
        with pytest.raises(LLMConfigError, match=said):
            export(config, tmp_path / "out", tmp_path / name)
    with pytest.raises(LLMError, match="there is no directory"):
        export(config, tmp_path / "out", tmp_path / "nowhere" / "answers.jsonl")
    with pytest.raises(LedgerError, match="no run directory"):
        export(config, tmp_path)
    path.write_text('{"prompt": "y"}\n')
    with pytest.raises(DatasetError, match="dataset.digest was"):
        export(config, tmp_path / "out")
    assert run_llmpipe("export", "nowhere", cwd=tmp_path).stderr == (
        "llmpipe: nowhere is no run directory: no run has begun in it; give the run's own command\n"
    )


@pytest.fixture
def two_runs(
    write_jsonl: Callable[..., Path], tmp_path: Path, echo_config: Callable[..., RunConfig]
) -> list[RunConfig]:
    """Make two runs over the same rows, in the directories 0 and 1."""
    configs = [echo_config(write_jsonl({"id": "a", "prompt": "x y"}), f"sampling.max_tokens={n}") for n in (1, 2)]
    for number, config in enumerate(configs):
        llmpipe.run(config, tmp_path / str(number))
    return configs


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_an_export_is_written_again_and_another_runs_is_replaced_only_when_asked(
    format: str, two_runs: list[RunConfig], tmp_path: Path
) -> None:
    file = tmp_path / f"answers.{format}"
    export(two_runs[0], tmp_path / "0", file)
    first = file.read_bytes()
    export(two_runs[0], tmp_path / "0", file)
    assert file.read_bytes() == first
    with pytest.raises(LLMError, match=r"exported from another run \(in 0\); .*replace it with --force"):
        export(two_runs[1], tmp_path / "1", file)
    assert file.read_bytes() == first
    export(two_runs[1], tmp_path / "1", file, force=True)
    assert file.read_bytes() != first


def test_an_export_that_was_killed_between_its_two_names_can_be_written_again(
    two_runs: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, renamed = tmp_path / "answers.jsonl", os.replace
    export(two_runs[0], tmp_path / "0", file)

    def killed(old: Path, new: Path) -> None:
        if new == file:
            raise KeyboardInterrupt
        renamed(old, new)

    monkeypatch.setattr(os, "replace", killed)
    config = replace(two_runs[0], output=replace(two_runs[0].output, prefix="llm_"))
    with pytest.raises(KeyboardInterrupt):
        export(config, tmp_path / "0", file)
    monkeypatch.undo()
    export(config, tmp_path / "0", file)
    assert "llm_completion" in json.loads(file.read_bytes())


@pytest.mark.parametrize("force", [False, True])
def test_an_export_replaces_nothing_that_llmpipe_did_not_write(
    force: bool, two_runs: list[RunConfig], tmp_path: Path
) -> None:
    answers = export(two_runs[1], tmp_path / "1", tmp_path / "earlier.jsonl").path
    edited = export(two_runs[0], tmp_path / "0", tmp_path / "edited.jsonl").path
    edited.write_bytes(edited.read_bytes() + b"{}\n")
    (tmp_path / "directory.jsonl").mkdir()
    (tmp_path / "own.jsonl").write_text('{"mine": 1}\n')
    (tmp_path / "empty.parquet").touch()
    (tmp_path / "0" / "partial.jsonl").write_text("mine")
    (tmp_path / "link.jsonl").symlink_to(answers)
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.link(tmp_path / "rows.jsonl", tmp_path / "hard.jsonl")
    os.link(tmp_path / "0/outputs.jsonl", tmp_path / "linked.jsonl")
    names = "directory own edited link dangling pipe hard linked rows".split()
    files = [*(tmp_path / f"{name}.jsonl" for name in names), tmp_path / "empty.parquet", None]
    files += [tmp_path / "0" / ".." / "rows.jsonl", tmp_path / "1/outputs.jsonl", tmp_path / "1/OUTPUTS.parquet"]
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for file in files:
        with pytest.raises(LLMError):
            export(two_runs[0], tmp_path / "0", file, force)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert not [file for file in tmp_path.rglob("*.tmp")]


def test_a_pipe_in_the_place_of_a_file_holds_nobody_up(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    config = llmpipe.compose(["backend=echo", f"dataset.path={write_jsonl({'prompt': 'hi'})}"])
    llmpipe.run(config, tmp_path / "out")
    export(config, tmp_path / "out")
    for name in ("metrics.json", ".partial.jsonl.llmpipe"):
        (tmp_path / "out" / name).unlink()
        os.mkfifo(tmp_path / "out" / name)
    program = (
        "import llmpipe; from llmpipe.export import export\n"
        f"config = llmpipe.compose(['backend=echo', 'dataset.path={config.dataset.path}'])\n"
        "for work in (llmpipe.run, export):\n"
        "    try: work(config, 'out')\n"
        "    except llmpipe.LLMError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert "metrics.json: it is no regular file; move it away" in done.stdout, done.stderr
    assert "partial.jsonl is there already, and llmpipe did not write it" in done.stdout


def test_an_earlier_export_that_the_run_reads_is_not_replaced_and_no_file_is_added_to_a_dataset(
    two_runs: list[RunConfig], tmp_path: Path, echo_config: Callable[..., RunConfig]
) -> None:
    (tmp_path / "rows").mkdir()
    earlier = export(two_runs[0], tmp_path / "0", tmp_path / "rows" / "earlier.jsonl").path
    (tmp_path / "other").symlink_to("rows")
    for number, path in enumerate((earlier, tmp_path / "rows", tmp_path / "rows" / "*.jsonl")):
        config = echo_config(path, "output.prefix=again_")
        llmpipe.run(config, out := tmp_path / f"again{number}")
        for file in (earlier, tmp_path / "other" / "earlier.jsonl", tmp_path / "other" / "new.jsonl"):
            if file.exists() or path != earlier:
                with pytest.raises(LLMConfigError, match="dataset.path=.* reads it"):
                    export(config, out, file, force=True)
    assert sorted(file.name for file in (tmp_path / "rows").iterdir()) == [".earlier.jsonl.llmpipe", "earlier.jsonl"]


def test_of_two_exports_to_one_file_at_once_the_second_is_refused_and_the_first_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "export.jsonl"
    with own_file(path, {"run": 1}) as first:
        first.write(b"begun, ")
        first.flush()
        with pytest.raises(LLMError, match="being written by another process"), own_file(path, {"run": 1}):
            pass
        first.write(b"and ended")
    assert path.read_bytes() == b"begun, and ended"
    with own_file(path, {"run": 1}) as again:
        again.write(b"anew")
    assert path.read_bytes() == b"anew"
    assert sorted(file.name for file in tmp_path.iterdir()) == [".export.jsonl.llmpipe", "export.jsonl"]


def test_a_plan_replaces_an_earlier_one_and_no_file_of_another_origin(
    write_jsonl: Callable[..., Path], tmp_path: Path, echo_config: Callable[..., RunConfig]
) -> None:
    config, mine = echo_config(write_jsonl({"prompt": "x"})), tmp_path / "plan.json"
    mine.write_text("mine")
    with pytest.raises(LLMError, match="llmpipe did not write it"):
        plan(config, tmp_path)
    assert mine.read_text() == "mine"
    mine.unlink()
    plan(config, tmp_path)
    plan(config, tmp_path)

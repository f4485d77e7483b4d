"""What can be read only once is kept in the run directory: standard input, pipes, process substitution."""

from __future__ import annotations

import errno
import gzip
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import filelock
import pytest

import llmpipe
from llmpipe import DatasetError, LLMConfigError
from llmpipe.plan import plan

TEXT = b'{"prompt": "a b"}\n{"prompt": "c"}\n'
ECHO = ["backend=echo", "dataset.path=-", "hydra.run.dir=out"]


def run_llmpipe(*arguments: str, cwd: Path, given: bytes | None = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "llmpipe", *arguments], cwd=cwd, input=given, capture_output=True)


def completions(directory: Path) -> list[str]:
    return [json.loads(line)["completion"] for line in (directory / "outputs.jsonl").open()]


def feed(path: Path, data: bytes) -> None:
    threading.Thread(target=path.write_bytes, args=(data,)).start()


def test_standard_input_is_run_resumed_without_it_and_never_taken_for_another(tmp_path: Path) -> None:
    first = run_llmpipe(*ECHO, cwd=tmp_path, given=gzip.compress(TEXT))
    assert first.returncode == 0, first.stderr
    assert completions(tmp_path / "out") == ["a b", "c"]
    (tmp_path / "out" / "outputs.jsonl").unlink()
    again = run_llmpipe("resume", "out", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert completions(tmp_path / "out") == ["a b", "c"]
    same = run_llmpipe(*ECHO, cwd=tmp_path, given=gzip.compress(TEXT, 9))
    other = run_llmpipe(*ECHO, cwd=tmp_path, given=b'{"prompt": "other"}')
    assert b"dataset.path='-' is not what the run in" in other.stderr and other.returncode == 1
    assert same.returncode in (0, 1) and completions(tmp_path / "out") == ["a b", "c"]


def test_a_refused_or_planned_run_leaves_no_copy(tmp_path: Path) -> None:
    for given, *verb in ((b"{bad\n{bad\n",), (TEXT, "plan")):
        run_llmpipe(*verb, *ECHO, cwd=tmp_path, given=given)
        assert not [file.name for file in (tmp_path / "out").iterdir() if "input" in file.name]


@pytest.mark.parametrize("end", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_copy_that_could_not_be_finished_is_not_left_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    def copy_some(stream: IO[bytes], written: IO[bytes], length: int) -> None:
        written.write(b"some")
        raise end

    monkeypatch.setattr("llmpipe.datasets.inputs.shutil.copyfileobj", copy_some)
    os.mkfifo(tmp_path / "pipe")
    feed(tmp_path / "pipe", TEXT)
    with pytest.raises((DatasetError, KeyboardInterrupt), match="No space left|^$"):
        llmpipe.run(llmpipe.compose([ECHO[0], f"dataset.path={tmp_path / 'pipe'}"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sweep_is_told_that_standard_input_can_be_read_once(tmp_path: Path) -> None:
    done = run_llmpipe("-m", *ECHO[:2], "hydra.sweep.dir=out", "seed=1,2", cwd=tmp_path, given=b"prompt\nx\n")
    assert done.returncode == 1 and b"can be read only once: save it as a file first" in done.stderr
    assert completions(tmp_path / "out" / "0") == ["x"]


def test_a_pipe_with_a_name_is_read_once_however_often_the_run_is_taken_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    config = llmpipe.compose(["backend=echo", f"dataset.path={tmp_path / 'pipe'}"])
    feed(tmp_path / "pipe", b"prompt;note\na b;1\n")
    planned = plan(config, tmp_path / "run")
    feed(tmp_path / "pipe", b"prompt;note\na b;1\n")
    assert llmpipe.run(config, tmp_path / "run")["rows"] == planned["rows"] == 1
    (tmp_path / "run" / "outputs.jsonl").unlink()
    llmpipe.run(config, tmp_path / "run", resumed=True)
    assert completions(tmp_path / "run") == ["a b"]
    (tmp_path / "run" / ".input-0").unlink()
    with pytest.raises(DatasetError, match=r"\.input-0 is gone, the copy of what was read"):
        llmpipe.run(config, tmp_path / "run", resumed=True)


def test_a_copy_that_a_killed_beginning_left_is_never_taken_for_what_another_run_reads(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(TEXT)
    (tmp_path / "run").mkdir()
    for left in (".input-0", ".input-0.tmp", ".input-1"):
        (tmp_path / "run" / left).write_bytes(b'{"prompt": "other"}\n')
    config = llmpipe.compose(["backend=echo", f"dataset.path={tmp_path / 'rows.jsonl'}"])
    llmpipe.run(config, tmp_path / "run")
    assert not list((tmp_path / "run").glob(".input-*"))
    (tmp_path / "run" / "outputs.jsonl").unlink()
    llmpipe.run(config, tmp_path / "run", resumed=True)
    assert completions(tmp_path / "run") == ["a b", "c"]


def test_who_comes_second_leaves_the_copy_that_the_first_has_made(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".input-0").write_bytes(TEXT)  # by one that has only just begun to look through its rows
    with filelock.FileLock(tmp_path / "out" / ".lock"):
        second = run_llmpipe(*ECHO, cwd=tmp_path, given=b'{"prompt": "other"}')
    assert second.returncode == 1 and b"in use by another process" in second.stderr
    assert (tmp_path / "out" / ".input-0").read_bytes() == TEXT


def test_a_stream_says_its_format_where_its_content_does_not(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    config = llmpipe.compose(["backend=echo", f"dataset.path={tmp_path / 'pipe'}", "dataset.format=tsv"])
    feed(tmp_path / "pipe", b"a,b;c\tprompt\n1\tx\n")
    llmpipe.run(config, tmp_path / "run")
    assert completions(tmp_path / "run") == ["x"]
    feed(tmp_path / "pipe", b"prompt\n")
    with pytest.raises(LLMConfigError, match="dataset.format='tvs'"):
        llmpipe.run(llmpipe.compose(["backend=echo", f"dataset.path={tmp_path / 'pipe'}", "dataset.format=tvs"]), "no")

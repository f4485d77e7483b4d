"""Runs that were ended and go on: nothing is lost, nothing is computed twice, and the files are those of one run."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import bytes_of, committed, rows_of, start, start_command

import llmpipe
from llmpipe import Chunk, EchoRunner, LedgerError, LLMInferenceError, Request
from llmpipe.exceptions import RunInterrupted
from llmpipe.progress import Progress

Compose = Callable[..., llmpipe.RunConfig]


def stop_after(monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    """Make the runner as a whole fail after some answers."""
    stream = EchoRunner.stream

    def failing(self: EchoRunner, requests: Iterable[Request]) -> Iterator[Chunk]:
        for number, chunk in enumerate(stream(self, requests)):
            if number == chunks:
                raise LLMInferenceError("the device is gone")
            yield chunk

    monkeypatch.setattr(EchoRunner, "stream", failing)


def test_a_finished_run_is_not_run_again_and_its_files_stay_byte_identical(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose, asked: list[Any]
) -> None:
    config = echo_config(write_jsonl({"prompt": "a"}, b"{bad"))
    first = llmpipe.run(config, tmp_path / "run")
    before = bytes_of(tmp_path / "run")
    assert llmpipe.run(config, tmp_path / "run") == first
    assert bytes_of(tmp_path / "run") == before
    assert len(asked) == 1


@pytest.mark.parametrize("name", ["outputs.jsonl", "errors.jsonl", "metrics.json", "report.html"])
def test_a_changed_file_of_a_finished_run_is_refused_and_a_missing_one_written_again(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose, asked: list[Any], name: str
) -> None:
    path = write_jsonl({"prompt": "a"}, b"{bad")
    llmpipe.run(echo_config(path), tmp_path / "run")
    file = tmp_path / "run" / name
    before = file.read_bytes()
    file.write_bytes(before + b" ")
    for overrides in ([], ["output.prefix=other_"]):
        with pytest.raises(LedgerError, match=f"{name} was changed since the run; move it away"):
            llmpipe.run(echo_config(path, *overrides), tmp_path / "run")
        assert file.read_bytes() == before + b" "
    file.unlink()
    llmpipe.run(echo_config(path), tmp_path / "run")
    assert file.read_bytes() == before
    assert len(asked) == 1


def test_a_finished_run_is_written_in_another_format_without_running_again(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose, asked: list[Any]
) -> None:
    path = write_jsonl({"prompt": "a"})
    llmpipe.run(echo_config(path), tmp_path / "run")
    llmpipe.run(echo_config(path, "output=parquet", "output.prefix=p_"), tmp_path / "run")
    assert llmpipe.read_run(tmp_path / "run").rows["p_completion"].tolist() == ["a"]
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("sampling.temperature=0.7", "sampling.temperature was 0.0, is 0.7"),
        ("seed=1", "seed was 0, is 1"),
        ("prompt.system=hi", "prompt.system was None, is 'hi'"),
        ("dataset.limit=1", "dataset.limit was None, is 1"),
    ],
)
def test_another_question_in_the_same_directory_is_refused_with_the_difference(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose, override: str, shown: str
) -> None:
    path = write_jsonl({"prompt": "a"})
    llmpipe.run(echo_config(path), tmp_path / "run")
    with pytest.raises(LedgerError, match=shown):
        llmpipe.run(echo_config(path, override), tmp_path / "run")


def test_a_changed_dataset_is_refused(tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose) -> None:
    llmpipe.run(echo_config(write_jsonl({"prompt": "a"})), tmp_path / "run")
    with pytest.raises(LedgerError, match="dataset.digest was"):
        llmpipe.run(echo_config(write_jsonl({"prompt": "b"})), tmp_path / "run")


@pytest.mark.parametrize("chunks", [0, 1, 3, 4, 5])
def test_a_run_that_failed_continues_with_the_samples_it_lacks(
    tmp_path: Path,
    write_jsonl: Callable[..., Path],
    echo_config: Compose,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[tuple[int, tuple[int, ...]]],
    chunks: int,
) -> None:
    config = echo_config(write_jsonl({"prompt": "a"}, b"{bad", {"prompt": "b"}, {"prompt": "c"}), "sampling.n=2")
    with monkeypatch.context() as patch:
        stop_after(patch, chunks)
        with pytest.raises(LLMInferenceError, match="the device is gone"):
            llmpipe.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "outputs.jsonl").exists()
    asked.clear()
    metrics = llmpipe.run(config, tmp_path / "run")
    wanted = [(row, sample) for row in (0, 2, 3) for sample in (0, 1)][chunks:]
    assert [(row, sample) for row, samples in asked for sample in samples] == wanted
    llmpipe.run(config, tmp_path / "whole")
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")
    assert (metrics["rows_ok"], metrics["rows_error"]) == (3, 1)


def test_a_run_in_use_by_another_process_is_refused(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose
) -> None:
    config = echo_config(write_jsonl({"prompt": "a"}, {"prompt": "b"}))

    def again(_: Progress) -> None:
        with pytest.raises(LedgerError, match="in use by another process"):
            llmpipe.run(config, tmp_path / "run")

    llmpipe.run(config, tmp_path / "run", progress=again)
    assert len(rows_of(tmp_path / "run")) == 2


def test_a_signal_stops_the_run_and_the_library_can_continue_it(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose, asked: list[Any]
) -> None:
    config = echo_config(write_jsonl(*({"prompt": str(i)} for i in range(5))))

    wishes = [signal.SIGTERM]  # one: a second one ends the process

    def stop(progress: Progress) -> None:
        if wishes and progress.done == 2:
            os.kill(os.getpid(), wishes.pop())

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunInterrupted, match="interrupted by SIGTERM; continue with: llmpipe resume "):
        llmpipe.run(config, tmp_path / "run", progress=stop)
    assert signal.getsignal(signal.SIGTERM) is before
    assert [row for row, _ in asked] == [0, 1]
    llmpipe.run(config, tmp_path / "run")
    assert [row for row, _ in asked] == [0, 1, 2, 3, 4]
    assert [row["completion"] for row in rows_of(tmp_path / "run")] == list("01234")


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_stops_the_run_once_however_often_it_says_so_unless_nohup_ignores_it(
    ignored: bool, tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose
) -> None:
    config = echo_config(write_jsonl({"prompt": "a"}, {"prompt": "b"}))

    def hang_up(_: Progress) -> None:
        for _ in range(2):  # the kernel, and the shell
            os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        if ignored:
            assert llmpipe.run(config, tmp_path / "run", progress=hang_up)["rows_ok"] == 2
        else:
            with pytest.raises(RunInterrupted, match="interrupted by SIGHUP"):
                llmpipe.run(config, tmp_path / "run", progress=hang_up)
    finally:
        signal.signal(signal.SIGHUP, before)


# --- real processes ---------------------------------------------------------------------------------------------------


def resume(directory: Path) -> tuple[int, str]:
    process = start_command([sys.executable, "-m", "llmpipe", "resume", str(directory)])
    said = "".join(process.communicate(timeout=120))
    return process.returncode, said


def signal_midway(process: subprocess.Popen[str], directory: Path, signum: int) -> int:
    """Send a signal once some rows are committed; return how many were by the end of the process."""
    deadline = time.monotonic() + 60
    while not committed(directory):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(signum)
    process.communicate(timeout=60)
    return committed(directory)


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "rows.jsonl.gz"
    lines = (b'{"id": "r%d", "prompt": "row %d"}\n' % (i, i) if i % 100 else b"{bad\n" for i in range(12_000))
    path.write_bytes(gzip.compress(b"".join(lines), 1))
    return path


@pytest.fixture(scope="module")
def uninterrupted(many_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("whole")
    metrics = llmpipe.run(llmpipe.compose(["backend=echo", f"dataset.path={many_rows}"]), directory)
    assert (metrics["rows"], metrics["rows_error"]) == (12_000, 120)
    return rows_of(directory)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_ended_by_a_signal_resumes_to_what_an_uninterrupted_one_gives(
    tmp_path: Path, many_rows: Path, uninterrupted: list[dict[str, Any]], signum: signal.Signals
) -> None:
    process = start(many_rows, tmp_path / "run")
    count = signal_midway(process, tmp_path / "run", signum)
    assert 0 < count < 12_000
    assert process.returncode == (-9 if signum == signal.SIGKILL else 128 + signum)
    assert not (tmp_path / "run" / "outputs.jsonl").exists()
    code, said = resume(tmp_path / "run")
    assert code == 3, said
    assert rows_of(tmp_path / "run") == uninterrupted
    if signum == signal.SIGKILL:  # once is enough: now that it is finished, nothing is done any more
        before = bytes_of(tmp_path / "run")
        assert resume(tmp_path / "run")[0] == 3
        assert bytes_of(tmp_path / "run") == before

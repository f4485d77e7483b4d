"""Durable and stoppable within a second, whatever the model does: while long rows run, and in the middle of a step."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import committed

import llmpipe
from llmpipe import BaseLLMRunner, LLMInferenceError, LLMRunnerFactory, RunConfig
from llmpipe.exceptions import RunInterrupted
from llmpipe.ledger import LedgerSnapshot
from llmpipe.progress import Progress
from llmpipe.runners.driver import Driver
from llmpipe.stopping import Stops, WaitingIsOver
from llmpipe.system.workers import passing_on

LONG = ["sampling.max_tokens=15000", "backend.context=20000", "backend.threads=1"]
BACKENDS = {
    "llama_cpp": ["backend=llama_cpp"],
    "slots": ["backend=transformers", "device=cpu"],
    "padded": ["backend=transformers", "device=cpu", "backend.batching=padded"],
    "isolated": ["backend=llama_cpp", "backend.isolation=true"],
}
PADDED = {"batching": "padded"}
SECOND = 1.0


def short_and_long(path: Path) -> Path:
    """Write two rows of a token and two of a minute."""
    path = path / "rows.jsonl"
    rows = [{"prompt": f"Tell me about {i}", "sampling": {"max_tokens": 1} if i < 2 else {}} for i in range(4)]
    for row in rows[2:]:
        row["sampling"] = {"ignore_eos": True}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def wait_for(condition: Callable[[], bool], seconds: float) -> float:
    """Return the time at which `condition` was met."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.05)
    return time.monotonic()


@pytest.mark.parametrize("backend", BACKENDS)
def test_finished_rows_are_durable_and_the_time_limit_acts_within_a_second_while_long_rows_run(
    backend: str, tmp_path: Path
) -> None:
    config = llmpipe.compose(
        [*BACKENDS[backend], *LONG, f"dataset.path={short_and_long(tmp_path)}", "run_timeout_s=1.5"]
    )
    finished: dict[int, float] = {}

    def note(progress: Progress) -> None:
        finished.setdefault(progress.done, time.monotonic())

    durable: list[float] = []
    look = threading.Thread(
        target=lambda: durable.append(wait_for(lambda: committed(tmp_path / "run") == 2, 60)), daemon=True
    )
    look.start()
    with pytest.raises(LLMInferenceError, match=r"run_timeout_s=1.5 is over; continue with: llmpipe resume "):
        llmpipe.run(config, tmp_path / "run", progress=note)
    look.join()
    assert max(finished) == 2 and durable[0] - finished[2] < SECOND
    with LedgerSnapshot(tmp_path / "run") as ledger:
        assert ledger.get("wall_s") < 1.5 + SECOND


def start(tmp_path: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "llmpipe", *overrides, "hydra.run.dir=run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.parametrize(
    ("backend", "signum", "code"),
    [("llama_cpp", signal.SIGKILL, -9), ("llama_cpp", signal.SIGINT, 130), ("isolated", signal.SIGTERM, 143)],
)
def test_a_signal_ends_a_process_whose_rows_are_long_within_a_second_and_what_was_finished_is_there(
    backend: str, signum: signal.Signals, code: int, tmp_path: Path
) -> None:
    process = start(tmp_path, *BACKENDS[backend], *LONG, f"dataset.path={short_and_long(tmp_path)}")
    try:
        wait_for(lambda: committed(tmp_path / "run") == 2, 60)
        process.send_signal(signum)
        sent = time.monotonic()
        said = process.communicate(timeout=30)[1]
        assert process.returncode == code, said
        assert time.monotonic() - sent < 2 * SECOND  # Python and the libraries take some time to end
        assert committed(tmp_path / "run") == 2
    finally:
        process.kill()


# --- the tick ---------------------------------------------------------------------------------------------------------


class Enough(BaseException):
    """What a tick raises."""


@pytest.mark.parametrize(
    ("backend", "batching", "prefills"), [("llama_cpp", {}, 3), ("transformers", {}, 3), ("transformers", PADDED, 1)]
)
def test_each_step_has_a_tick_and_what_that_raises_ends_the_stream_and_leaves_the_runner_as_it_was(
    backend: str, batching: dict[str, str], prefills: int
) -> None:
    options = {"backend": backend, "device": "cpu", "threads": 1, "batch_tokens": 64, "temperature": 0.0, **batching}
    with LLMRunnerFactory.create_runner(options) as runner:
        prompt = "The fox went home, and the lantern with it; " * 6
        asked = [runner.request(f"{prompt} {i}", i, max_tokens=4, ignore_eos=True) for i in range(3)]

        def texts(tick: Callable[[], None] = lambda: None) -> dict[int, str | None]:
            return {done.request_id: done.text for done in runner.completions(asked, Driver(tick))}

        ticks: list[None] = []
        before = texts(lambda: ticks.append(None))
        assert len(ticks) >= prefills + 3
        for last in count():  # fewer than before: a common prefix is kept
            left = iter(range(last))

            def tick(left: Iterator[int] = left) -> None:
                if next(left, None) is None:
                    raise Enough

            try:
                again = texts(tick)
                break
            except Enough:
                pass
        assert last >= 3 and again == before


def test_a_backend_of_others_has_a_tick_after_each_chunk_and_may_make_its_own() -> None:
    class Simple(BaseLLMRunner):
        def _initialize_model(self) -> None:
            pass

        def _run_streaming(self, prompt: str, max_tokens: int, temperature: float) -> Iterator[str]:
            for word in prompt.split():
                self.tick()
                yield word

    with Simple({}) as runner:
        ticks: list[None] = []
        asked = [runner.request("one two three")]
        assert [done.text for done in runner.completions(asked, Driver(lambda: ticks.append(None)))] == ["onetwothree"]
        assert len(ticks) == 3 + 4
        runner.tick()  # nobody drives it: nothing happens
        assert len(ticks) == 7


# --- in the middle of a step ------------------------------------------------------------------------------------------


def one_long_step(tmp_path: Path, *overrides: str) -> RunConfig:
    """Configure a run whose only row is computed in one call, which takes some ten seconds."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": " a" * 12_000}))
    sizes = ["backend.batch_tokens=12000", "backend.context=13000", "backend.threads=1", "sampling.max_tokens=1"]
    return llmpipe.compose(
        ["backend=llama_cpp", *sizes, "prompt=raw", f"dataset.path={tmp_path / 'rows.jsonl'}", *overrides]
    )


def signal_after(seconds: float, *signums: int) -> None:
    """Send signals to this process, the first so many seconds after a run has begun to heed them."""
    before = signal.getsignal(signums[0])

    def send() -> None:
        while signal.getsignal(signums[0]) is before:
            time.sleep(0.01)
        for signum in signums:
            time.sleep(seconds)
            os.kill(os.getpid(), signum)

    threading.Thread(target=send, daemon=True).start()


def check_ended(error: type[Exception], config: RunConfig, directory: Path, seconds: float) -> None:
    """Run to an end by `error`, so many seconds after the model was loaded."""
    with pytest.raises(error):
        llmpipe.run(config, directory)
    with LedgerSnapshot(directory) as ledger:
        assert ledger.get("wall_s") < seconds


@pytest.mark.parametrize("in_thread", [False, True])
def test_the_time_limit_ends_a_step_of_llama_cpp_that_takes_long(in_thread: bool, tmp_path: Path) -> None:
    config = one_long_step(tmp_path, "run_timeout_s=0.3")
    failed: list[BaseException] = []

    def work() -> None:
        try:
            check_ended(LLMInferenceError, config, tmp_path / "run", 0.3 + SECOND)
        except BaseException as error:
            failed.append(error)

    if in_thread:  # to which Python delivers no signals
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    else:
        work()
    assert not failed


def test_a_signal_ends_a_step_of_llama_cpp_that_takes_long(tmp_path: Path) -> None:
    config = one_long_step(tmp_path)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGURG), signal.set_wakeup_fd(-1)
    signal_after(2, signal.SIGTERM)
    check_ended(RunInterrupted, config, tmp_path / "run", 2 + SECOND)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGURG), signal.set_wakeup_fd(-1)) == before


def test_a_nudge_waits_for_the_end_of_what_native_code_has_called() -> None:
    """What is raised there is dropped, and the run would go on."""
    from llmpipe.runners.llama_cpp.log import _callback, log

    class Nudged(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            signal.raise_signal(signal.SIGURG)

    stops, handler = Stops(llmpipe.compose(["backend=echo"]), rows=1), Nudged()
    log.addHandler(handler)
    with stops, pytest.raises(WaitingIsOver), stops.watching(lambda: None):
        try:
            _callback(3, b"something\n", None)  # by way of C
        finally:
            log.removeHandler(handler)
        signal.raise_signal(signal.SIGURG)
        pytest.fail("it goes on")


@pytest.mark.parametrize("at_work", [passing_on, lambda: Stops(llmpipe.compose(["backend=echo"]), rows=1)])
def test_of_ignored_signals_a_run_and_a_sweep_leave_the_hangup_alone(at_work: Callable[[], Any]) -> None:
    signums = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(signum, signal.SIG_IGN) for signum in signums]
    try:
        with at_work():
            ignored = [signal.getsignal(signum) is signal.SIG_IGN for signum in signums]
    finally:
        for signum, handler in zip(signums, before, strict=True):
            signal.signal(signum, handler)
    assert ignored == [False, False, True]


def foreign(tmp_path: Path, *prompts: str, **options: Any) -> list[str]:
    """Return the arguments of a run of the breaking backend in this process."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    (tmp_path / "conf/backend").mkdir(parents=True)
    options = {"_target_": "breaking.Breaking", **options}
    (tmp_path / "conf/backend/breaking.yaml").write_text(json.dumps(options))
    return [f"dataset.path={tmp_path / 'rows.jsonl'}", "trusted_modules=[breaking]"]


@pytest.mark.parametrize("signum", [None, signal.SIGINT])
def test_a_backend_of_others_that_waits_is_left_within_a_second(signum: int | None, tmp_path: Path) -> None:
    config = llmpipe.compose(["backend=echo", *foreign(tmp_path, "fine", "hang")])
    config.backend = {"_target_": "breaking.Breaking", "held": 1}
    if signum is None:
        config.run_timeout_s = 0.3
    else:
        signal_after(0.3, signum)
    check_ended(RunInterrupted if signum else LLMInferenceError, config, tmp_path / "run", 0.3 + SECOND)
    assert committed(tmp_path / "run") == 1


def test_the_time_limit_acts_while_a_backend_of_others_gives_out_chunks(tmp_path: Path) -> None:
    config = llmpipe.compose(["backend=echo", *foreign(tmp_path, "word " * 3000), "run_timeout_s=0.3"])
    config.backend = {"_target_": "breaking.Breaking", "load": "slow"}
    check_ended(LLMInferenceError, config, tmp_path / "run", 0.3 + 0.1)


def test_a_second_signal_ends_the_process_though_native_code_never_returns(tmp_path: Path) -> None:
    arguments = foreign(tmp_path, "fine", "compute", held=1)
    process = start(tmp_path, f"--config-dir={tmp_path / 'conf'}", "backend=breaking", *arguments)
    try:
        wait_for(lambda: committed(tmp_path / "run") == 1, 60)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        sent = time.monotonic()
        process.communicate(timeout=30)
        assert process.returncode == 130 and time.monotonic() - sent < SECOND
    finally:
        process.kill()


# --- a sweep in several processes -------------------------------------------------------------------------------------


def start_sweep(tmp_path: Path, *overrides: str) -> subprocess.Popen[str]:
    (tmp_path / "tmp").mkdir()
    (conf := tmp_path / "conf").mkdir(exist_ok=True)
    sweep = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep", "seed=1,2,3,4"]
    return subprocess.Popen(
        [sys.executable, "-m", "llmpipe", f"--config-dir={conf}", *sweep, *overrides],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
            "TMPDIR": str(tmp_path / "tmp"),
        },
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children(recursive=True) if "Loky" in str(child.cmdline())]


@pytest.mark.parametrize(
    ("signum", "group", "code"),
    [
        (signal.SIGINT, True, 130),  # Ctrl-C in a terminal
        (signal.SIGTERM, False, 143),
        (signal.SIGTERM, True, 143),
        (signal.SIGKILL, False, -9),
    ],
)
def test_a_sweep_in_several_processes_ends_as_a_whole_and_what_its_jobs_finished_is_there(
    signum: signal.Signals, group: bool, code: int, tmp_path: Path
) -> None:
    asked = [*BACKENDS["llama_cpp"], *LONG, f"dataset.path={short_and_long(tmp_path)}"]
    process = start_sweep(tmp_path, *asked)
    try:
        wait_for(lambda: all(committed(tmp_path / "sweep" / job) == 2 for job in "01"), 60)
        workers = workers_of(process)
        assert len(workers) == 2
        (os.killpg if group else os.kill)(process.pid, signum)
        sent = time.monotonic()
        said = process.communicate(timeout=30)[1]
        if signum != signal.SIGKILL:
            assert not [worker for worker in workers if worker.is_running()]
            assert said.splitlines()[-1].startswith(f"llmpipe: interrupted by {signum.name}; ")
            assert "Traceback" not in said and "Error" not in said, said
        wait_for(lambda: not [worker for worker in workers if worker.is_running()], 10)
        assert process.returncode == code and time.monotonic() - sent < 5 * SECOND
        assert sorted(file.name for file in (tmp_path / "sweep").iterdir()) == ["0", "1", "multirun.yaml"]
        assert [committed(tmp_path / "sweep" / job) for job in "01"] == [2, 2]
        assert not [path for path in (tmp_path / "tmp").iterdir() if "llmpipe" in path.name]
    finally:
        process.kill()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_the_processes_of_a_sweep_end_while_they_load_models(signum: signal.Signals, tmp_path: Path) -> None:
    arguments = foreign(tmp_path, "fine", load="hang", pids=str(tmp_path / "pids"))
    process = start_sweep(tmp_path, "backend=breaking", *arguments)
    try:
        wait_for(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().count("\n") == 2, 60)
        workers = workers_of(process)
        process.send_signal(signum)
        process.communicate(timeout=30)
        assert process.returncode == (143 if signum == signal.SIGTERM else -9)
        wait_for(lambda: not [worker for worker in workers if worker.is_running()], 3)
    finally:
        process.kill()


def test_a_process_of_a_sweep_that_is_killed_ends_it_in_a_line(tmp_path: Path) -> None:
    process = start_sweep(tmp_path, *BACKENDS["llama_cpp"], *LONG, f"dataset.path={short_and_long(tmp_path)}")
    try:
        wait_for(lambda: all(committed(tmp_path / "sweep" / job) == 2 for job in "01"), 60)
        workers_of(process)[0].kill()
        said = process.communicate(timeout=30)[1]
        assert process.returncode == 1 and "Traceback" not in said, said
        assert said.splitlines()[-1].startswith("llmpipe: a process of the sweep has died; ")
    finally:
        process.kill()

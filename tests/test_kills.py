"""Kills of a backend's process from outside, and a machine without memory: what no row is to blame for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_isolation import arguments_of, child_of, config_of, isolated, requests_of, rows_of, start

import llmpipe
from llmpipe import LLMInferenceError, LLMInitializationError, LLMRunnerFactory
from llmpipe.ledger import LedgerSnapshot
from llmpipe.runners import child as child_module
from llmpipe.runners import triage
from llmpipe.runners.driver import Driver
from llmpipe.runners.triage import ALONE_ATTEMPTS, LOSSES
from llmpipe.system.machine import oom_kills

FROM_OUTSIDE = r"was ended by a kill from outside \(signal 9, SIGKILL\)"


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triage, "PAUSE_S", 0.01)


@contextmanager
def killer(pids: Path, delays: list[float], signum: int = signal.SIGKILL) -> Iterator[None]:
    """Kill each process that writes its id to the file, as it loads, so long after that."""
    done = threading.Event()

    def kill() -> None:
        for number, delay in enumerate(delays):
            while not (pids.exists() and len(found := pids.read_text().splitlines()) > number):
                if done.wait(0.002):
                    return
            if not done.wait(delay):
                os.kill(int(found[number]), signum)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


LONG = " ".join(f"word{i}" for i in range(40))


@pytest.mark.parametrize("kills", [2, 4])
def test_kills_amid_the_only_row_do_not_condemn_it(kills: int, tmp_path: Path) -> None:
    with isolated(load="slow", pids=str(tmp_path / "pids")) as runner, killer(tmp_path / "pids", [0.2] * kills):
        assert [c.text for c in runner.run([LONG])] == [LONG.upper()]
        assert runner.info()["isolation"]["restarts"] == kills


def test_ten_kills_while_rows_are_answered_cost_none_of_them(tmp_path: Path) -> None:
    prompts = [f"row {i} of some words" for i in range(70)]
    with isolated(load="slow", held=2, pids=str(tmp_path / "pids")) as runner, killer(tmp_path / "pids", [0.15] * 10):
        assert [c.text for c in runner.run(prompts)] == [prompt.upper() for prompt in prompts]
        assert runner.info()["isolation"]["restarts"] == 10


def test_a_kill_before_any_message_costs_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def send(child: Any, kind: str, content: Any = None, real: Any = child_module.Child.send) -> None:
        if kind == "requests":
            sent.append(len(content))
            if len(sent) in at:
                child._process.kill()
                child._process.wait()
        real(child, kind, content)

    monkeypatch.setattr(child_module.Child, "send", send)
    prompts = [f"row {i}" for i in range(9)]
    with isolated(held=9) as runner:
        for first in range(1, 6):
            sent: list[int] = []
            at = {first, first + 2, first + 4}
            assert [c.text for c in runner.run(prompts)] == [prompt.upper() for prompt in prompts]


def test_a_termination_signal_is_left_to_the_parent(tmp_path: Path) -> None:
    with isolated(load="slow", pids=str(tmp_path / "pids")) as runner:
        with killer(tmp_path / "pids", [0.1], signal.SIGTERM):
            assert [c.text for c in runner.run([LONG])] == [LONG.upper()]
        assert runner.info()["isolation"]["restarts"] == 0


def test_kills_while_the_model_is_loaded_again_are_tried_again(tmp_path: Path) -> None:
    with isolated(load="slow", pids=str(tmp_path / "pids")) as runner:
        with killer(tmp_path / "pids", [0.2, 0, 0]):
            assert [c.text for c in runner.run([LONG, "short"])] == [LONG.upper(), "SHORT"]


def test_kills_while_the_model_is_loaded_first_are_tried_again_and_then_named(tmp_path: Path) -> None:
    with killer(tmp_path / "pids", [0, 0]), isolated(load="doze", pids=str(tmp_path / "pids")):
        pass
    (tmp_path / "pids").unlink()
    with killer(tmp_path / "pids", [0] * LOSSES), pytest.raises(LLMInitializationError, match=FROM_OUTSIDE):
        isolated(load="doze", pids=str(tmp_path / "pids"))


def test_a_run_whose_backend_is_killed_again_and_again_ends_and_can_be_resumed(
    write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_jsonl({"prompt": "first"}, {"prompt": LONG})
    config = config_of(rows, held=1, load="slow", pids=str(tmp_path / "pids"))
    says = rf"{FROM_OUTSIDE}, and the backend was lost {LOSSES} times in a row; .* is safe: llmpipe resume "
    with killer(tmp_path / "pids", [0.2, *[0.05] * 10]), pytest.raises(LLMInferenceError, match=says):
        llmpipe.run(config, tmp_path / "run")
    assert len((tmp_path / "pids").read_text().splitlines()) <= LOSSES + 2
    metrics = llmpipe.run(config, tmp_path / "run")
    assert (metrics["rows_ok"], metrics["rows_error"]) == (2, 0)


def test_a_row_that_looks_like_a_kill_from_outside_lets_the_others_finish_and_is_given_up_after_three_runs(
    write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_jsonl(*({"prompt": prompt} for prompt in ["killed", *["fine"] * 20]))
    config = config_of(rows, held=4)
    for _ in range(ALONE_ATTEMPTS):
        with pytest.raises(LLMInferenceError, match=FROM_OUTSIDE):
            llmpipe.run(config, tmp_path / "run")
        with LedgerSnapshot(tmp_path / "run") as ledger:
            assert ledger.count() == 20
    assert llmpipe.run(config, tmp_path / "run")["rows_error"] == 1
    assert rows_of(tmp_path / "run")[0]["error"] == "ended its run 3 times, without an answer"


def test_an_attempt_that_somebody_ends_does_not_count(tmp_path: Path) -> None:
    def tick() -> None:
        if notes and notes[-1] == {0: ALONE_ATTEMPTS}:
            raise KeyboardInterrupt

    with isolated(load="slow") as runner:
        notes: list[dict[int, int]] = []
        driver = Driver(tick, {0: ALONE_ATTEMPTS - 1}, note_suspects=lambda suspects: notes.append(dict(suspects)))
        with pytest.raises(KeyboardInterrupt):
            list(runner.completions(requests_of(LONG), driver))
        assert notes[-1] == {0: ALONE_ATTEMPTS - 1}
        stream = runner.driven(requests_of(LONG), replace(driver, tick=lambda: None))
        next(stream)
        stream.close()
        assert notes[-1] == {0: ALONE_ATTEMPTS - 1}


def test_a_call_that_is_ended_while_the_backend_starts_again_leaves_it_usable() -> None:
    class Enough(Exception):
        pass

    def tick() -> None:
        if runner._child is not None and runner._child is not first:
            raise Enough

    with isolated(load="doze") as runner:
        first = runner._child
        assert first is not None
        first._process.kill()
        with pytest.raises(Enough):
            list(runner.completions(requests_of("one", "two"), Driver(tick)))
        assert [c.text for c in runner.run(["one", "two"])] == ["ONE", "TWO"]


def test_the_parent_and_its_backend_killed_together_cost_no_row(tmp_path: Path) -> None:
    arguments = arguments_of(tmp_path, [LONG, *["fine"] * 30], load="slow", held=2)
    for attempt in range(2):
        parent = start(*arguments, cwd=tmp_path)
        child = child_of(tmp_path, attempt)
        time.sleep(0.15)
        for pid in (child, parent.pid) if attempt else (parent.pid, child):
            os.kill(pid, signal.SIGKILL)
        parent.communicate()
    done = start(*arguments, cwd=tmp_path)
    assert (done.communicate(timeout=60), done.returncode)[1] == 0
    assert [row["completion"] for row in rows_of(tmp_path / "run")] == [LONG.upper(), *["FINE"] * 30]


def test_a_real_model_whose_process_is_killed_twice_answers_as_one_that_is_not(tmp_path: Path) -> None:
    config = {"backend": "llama_cpp", "isolation": True, "threads": 1, "reproducible": True, "temperature": 0.0}
    prompts = [f"Tell me story number {i}." for i in range(12)]
    with LLMRunnerFactory.create_runner(config) as runner:
        expected = [c.text for c in runner.run(prompts, max_tokens=60, ignore_eos=True)]
        requests = [runner.request(prompt, id=i, max_tokens=60, ignore_eos=True) for i, prompt in enumerate(prompts)]
        found, kills = {}, 0
        for completion in runner.completions(requests):
            found[completion.request_id] = completion.text
            if kills < 2:
                kills += 1
                os.kill(runner._child._process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        assert [found[i] for i in range(12)] == expected


def test_a_kill_while_a_model_is_tried_is_not_taken_for_its_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def send(child: Any, kind: str, content: Any = None, real: Any = child_module.Child.send) -> None:
        if kind == "stream" and not killed:
            killed.append(child._process.pid)
            os.kill(child._process.pid, signal.SIGKILL)
        real(child, kind, content)

    from llmpipe.runners.weights import BUNDLED_DIR

    killed: list[int] = []
    monkeypatch.setattr(child_module.Child, "send", send)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = shutil.copy(next(BUNDLED_DIR.glob("*.gguf")), tmp_path / "model.gguf")
    LLMRunnerFactory.create_runner({"backend": "llama_cpp", "model_path": str(model), "threads": 1}).close()
    assert killed
    assert [file.read_text() for file in (tmp_path / "llmpipe/loaded").iterdir()] == ["on"]


# --- a machine without memory -----------------------------------------------------------------------------------------

STARVED = "ran the machine out of memory: the system ended the backend (signal 9, SIGKILL)"


def test_a_row_for_which_the_machine_has_no_memory_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    counts = iter(range(10**6))
    monkeypatch.setattr(child_module, "oom_kills", lambda: next(counts))  # as if the system had counted each of them
    rows = write_jsonl(*({"prompt": prompt} for prompt in ["fine", "killed", "good", "killed"]))
    assert llmpipe.run(config_of(rows), tmp_path / "run")["rows_error"] == 2
    assert [row["error"] for row in rows_of(tmp_path / "run")] == [None, STARVED, None, STARVED]


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [
        ("cgroup/memory.events", "low 0\noom 9\noom_kill 3\noom_group_kill 1", 3),
        ("cgroup/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 4", 4),
        ("cgroup/memory.oom_control", "oom_kill_disable 0\nunder_oom 0", 0),
        ("proc/vmstat", "nr_free_pages 7\noom_kill 5\n", 5),
        ("proc/vmstat", "nr_free_pages 7\n", 0),
        ("nothing", "", 0),
    ],
)
def test_how_many_the_system_has_ended_is_read_of_the_own_group_or_of_the_machine(
    name: str, text: str, count: int, tmp_path: Path
) -> None:
    for directory in ("proc/self", "cgroup"):
        (tmp_path / directory).mkdir(parents=True)
    kind = "cgroup2 cgroup2 rw" if name.endswith("events") else "cgroup cgroup rw,memory"
    (tmp_path / "proc/self/cgroup").write_text("0::/\n4:memory:/\n")
    (tmp_path / "proc/self/mountinfo").write_text(f"30 23 0:26 / /cgroup rw - {kind}\n")
    (tmp_path / name).write_text(text)
    assert oom_kills(tmp_path) == count


@pytest.fixture
def small_group() -> Iterator[Path]:
    """Make a control group with little memory; only the superuser may."""
    own = next((line.split(":", 2) for line in open("/proc/self/cgroup") if ":memory:" in line), None)
    parent = Path("/sys/fs/cgroup/memory") / own[2].strip().lstrip("/") if own else Path("/sys/fs/cgroup")
    group, limit = parent / f"llmpipe-{os.getpid()}", "memory.limit_in_bytes" if own else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(400 * 2**20))
    except OSError:
        if group.exists():
            group.rmdir()
        pytest.skip("needs a control group that can be made")
    yield group
    for _ in range(100):
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.05)


@pytest.mark.slow
def test_the_system_that_ends_a_greedy_row_is_believed(small_group: Path, tmp_path: Path) -> None:
    arguments = arguments_of(tmp_path, ["fine", "gorge", "good"])
    join = f"import os, sys; open({str(small_group / 'cgroup.procs')!r}, 'w').write(str(os.getpid())); "
    program = join + "os.execv(sys.executable, [sys.executable, '-m', 'llmpipe', *sys.argv[1:]])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 3, done.stderr
    assert [row["error"] for row in rows_of(tmp_path / "run")] == [None, STARVED, None]

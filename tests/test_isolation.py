"""A backend in a process of its own: what crashes or hangs it costs one row, and nobody is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from breaking import Breaking, BreakingConfig
from runs import rows_of

import llmpipe
from llmpipe import (
    Chunk,
    LLMConfigError,
    LLMInferenceError,
    LLMInitializationError,
    LLMRunnerFactory,
    Request,
    RunConfig,
    SamplingConfig,
    compose,
)
from llmpipe.runners import child as child_module
from llmpipe.runners import service, triage
from llmpipe.runners.driver import Driver
from llmpipe.runners.isolated import IsolatedRunner
from llmpipe.runners.triage import ALONE_ATTEMPTS

TARGET = ["backend=echo", "backend._target_=breaking.Breaking", "trusted_modules=[breaking]"]


def config_of(path: Path, *overrides: str, **options: Any) -> RunConfig:
    """Compose a run of the breaking backend, isolated."""
    config = compose(["backend=echo", f"dataset.path={path}", "trusted_modules=[breaking]", *overrides])
    config.backend = {"_target_": "breaking.Breaking", "isolation": True, **options}
    return config


def isolated(**options: Any) -> IsolatedRunner:
    return IsolatedRunner("breaking.Breaking", BreakingConfig, options)


def requests_of(*prompts: str, samples: tuple[int, ...] = (0,)) -> Iterator[Request]:
    return (Request(i, SamplingConfig(), prompt, samples=samples) for i, prompt in enumerate(prompts))


def gone(pid: int, within_s: float = 10) -> bool:
    """Wait for a process to end; a zombie has."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


# --- a row that breaks its backend ------------------------------------------------------------------------------------

ENDS = {
    "segfault": "crashed the backend (signal 11, SIGSEGV)",
    "abort": "crashed the backend (signal 6, SIGABRT)",
    "exit": "ended the backend's process (exit code 3)",
    "hang": "hung the backend for 1 s",
    "stuck": "hung the backend for 1 s",
}


@pytest.mark.parametrize("deed", ENDS)
def test_a_row_that_breaks_its_backend_is_an_error_row_and_its_neighbours_finish(
    deed: str, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    prompts = [f"row {i} goes well" for i in range(20)]
    prompts[9] = f"in the {deed} middle"
    rows = write_jsonl(*({"prompt": prompt} for prompt in prompts))
    metrics = llmpipe.run(config_of(rows, row_timeout_s=1), tmp_path / "run")
    assert (metrics["rows_ok"], metrics["rows_error"]) == (19, 1)
    found = rows_of(tmp_path / "run")
    assert [row["completion"] for row in found] == [p.upper() if p != prompts[9] else None for p in prompts]
    assert found[9]["error"] == ENDS[deed]
    assert metrics["runner"]["isolation"]["restarts"] >= 2


def test_several_such_rows_are_all_found(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    bad = {0: "segfault", 1: "abort", 7: "exit", 19: "segfault"}
    rows = write_jsonl(*({"prompt": bad.get(i, f"row {i}")} for i in range(20)))
    metrics = llmpipe.run(config_of(rows), tmp_path / "run")
    found = rows_of(tmp_path / "run")
    assert {i: row["error"] for i, row in enumerate(found) if row["error"]} == {
        i: ENDS[deed] for i, deed in bad.items()
    }
    assert metrics["rows_ok"] == 16


def test_text_that_was_given_out_before_a_crash_is_not_there_twice() -> None:
    prompts = ["one two three four", "a b segfault", "five six seven eight"]
    with isolated(load="slow") as runner:
        done = runner.run([Request(i, SamplingConfig(), p, samples=(0, 1)) for i, p in enumerate(prompts)])
        assert [c.text for c in done] == ["ONE TWO THREE FOUR"] * 2 + [None] * 2 + ["FIVE SIX SEVEN EIGHT"] * 2
        assert done[0].first_token_s is not None and done[0].latency_s is not None
        with pytest.raises(LLMInferenceError, match="crashed or hung in the middle of the answer"):
            list(runner.generate_text_streaming("one abort"))
        assert runner.generate_text("still here") == "STILL HERE"


def test_answers_that_have_come_are_given_out_before_the_wish_to_stop_is_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Enough(Exception):
        pass

    def receive(child: Any, timeout_s: float, real: Any = child_module.Child.receive) -> Any:
        message = real(child, timeout_s)
        came.extend([message] if message is not None and message[0] == "chunks" else [])
        return message

    def tick() -> None:
        if came:
            raise Enough

    came: list[Any] = []
    monkeypatch.setattr(child_module.Child, "receive", receive)
    with isolated() as runner:
        done = []
        with pytest.raises(Enough):
            for completion in runner.completions(requests_of("one", "two"), Driver(tick)):
                done.append(completion)  # noqa: PERF402  of a stream that ends in an exception
        assert len(done) == len(came[0][1]) > 0


def test_a_crash_at_a_time_is_not_held_against_a_row() -> None:
    """A process killed from outside, when no row is at fault: all rows finish."""
    prompts = [f"row {i} with some words" for i in range(30)]
    with isolated(load="slow") as runner:
        done = {}
        for number, completion in enumerate(runner.completions(requests_of(*prompts))):
            done[completion.request_id] = completion.text
            if number == 3:
                assert runner._child is not None
                os.kill(runner._child._process.pid, signal.SIGKILL)
        assert done == {i: prompt.upper() for i, prompt in enumerate(prompts)}


def test_a_backend_that_dies_without_any_row_ends_the_stream_instead_of_being_started_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tick() -> None:
        if runner._child is not None:
            runner._child._process.kill()

    monkeypatch.setattr(triage, "PAUSE_S", 0.01)
    with isolated() as runner:
        stream = runner.completions((), Driver(tick))
        with pytest.raises((LLMInferenceError, LLMInitializationError), match="signal 9"):
            list(stream)


def test_a_suspect_that_never_came_to_an_end_is_given_up(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    """As if the machine went down each time that the row was run: the notes are made before each attempt."""
    with isolated(held=2) as runner:
        notes: list[dict[int, int]] = []
        noting = Driver(note_suspects=lambda suspects: notes.append(dict(suspects)))
        stream = runner.completions(requests_of("segfault", "fine"), noting)
        assert {c.request_id: c.error for c in stream} == {0: ENDS["segfault"], 1: None}
        assert notes[0] == {0: 0, 1: 0} and notes[1] == {0: 1, 1: 0}
        knowing = Driver(suspects={0: ALONE_ATTEMPTS, 1: 1})
        done = {c.request_id: c for c in runner.completions(requests_of("segfault", "fine", "also"), knowing)}
        assert done[0].error == "ended its run 3 times, without an answer"
        assert (done[1].text, done[2].text) == ("FINE", "ALSO")
        assert runner.info()["isolation"]["restarts"] == 4  # three times alone, and once for the other


# --- killed parents ---------------------------------------------------------------------------------------------------


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    return subprocess.Popen(
        [sys.executable, "-m", "llmpipe", *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def arguments_of(tmp_path: Path, prompts: list[str], **options: Any) -> list[str]:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    (tmp_path / "conf/backend").mkdir(parents=True)
    options = {"_target_": "breaking.Breaking", "isolation": True, "pids": str(tmp_path / "pids"), **options}
    (tmp_path / "conf/backend/breaking.yaml").write_text(json.dumps(options))
    return [f"--config-dir={tmp_path / 'conf'}", "backend=breaking", "dataset.path=rows.jsonl", "hydra.run.dir=run"] + [
        "trusted_modules=[breaking]"
    ]


def child_of(tmp_path: Path, number: int = 0) -> int:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if (tmp_path / "pids").exists() and len(pids := (tmp_path / "pids").read_text().splitlines()) > number:
            return int(pids[number])
        time.sleep(0.02)
    raise AssertionError("no child")


@pytest.mark.parametrize("deed", ["hang", "stuck"])
def test_a_killed_parent_leaves_no_child_whatever_that_does(deed: str, tmp_path: Path) -> None:
    parent = start(*arguments_of(tmp_path, ["fine", deed]), cwd=tmp_path)
    child = child_of(tmp_path)
    time.sleep(0.3)
    parent.kill()
    parent.communicate()
    assert gone(child)


def test_ctrl_c_is_the_parents_and_a_second_one_leaves_no_child(tmp_path: Path) -> None:
    parent = start(*arguments_of(tmp_path, [f"row {i} of many" for i in range(3000)], load="slow"), cwd=tmp_path)
    child = child_of(tmp_path)
    time.sleep(0.5)
    for _ in range(2):
        os.killpg(parent.pid, signal.SIGINT)
        os.kill(child, signal.SIGINT)
        time.sleep(0.005)
    parent.communicate(timeout=30)
    assert parent.returncode in (130, -signal.SIGINT)
    assert gone(child)


def test_the_first_ctrl_c_ends_a_run_whose_backend_hangs_and_it_can_be_resumed(tmp_path: Path) -> None:
    arguments = arguments_of(tmp_path, ["fine", "hang", "good"], held=1)
    parent = start(*arguments, cwd=tmp_path)
    child = child_of(tmp_path)
    time.sleep(1)
    parent.send_signal(signal.SIGINT)
    _, said = parent.communicate(timeout=30)
    assert parent.returncode == 130, said
    assert gone(child)
    again = start(*arguments, "+backend.row_timeout_s=1", cwd=tmp_path)
    assert (again.communicate(timeout=60), again.returncode)[1] == 3
    assert [row["completion"] for row in rows_of(tmp_path / "run")] == ["FINE", None, "GOOD"]


def test_a_run_that_is_over_time_ends_though_its_backend_hangs_and_can_be_resumed(
    write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_jsonl(*({"prompt": prompt} for prompt in ["fine", "hang", "good"]))
    with pytest.raises(LLMInferenceError, match=r"run_timeout_s=1.0 is over; continue with: llmpipe resume "):
        llmpipe.run(config_of(rows, "run_timeout_s=1", held=1), tmp_path / "run")
    assert llmpipe.run(config_of(rows, held=1, row_timeout_s=1), tmp_path / "run")["rows_ok"] == 2


def test_suspects_are_known_to_a_resumed_run(tmp_path: Path) -> None:
    """The parent is killed while a suspect is run alone: the next attempts know it, run it apart, and count."""
    arguments = arguments_of(tmp_path, ["abort", "hang"], held=2)
    pids = 0
    for attempts in range(1, ALONE_ATTEMPTS + 1):
        parent = start(*arguments, cwd=tmp_path)
        pids += 2 + ALONE_ATTEMPTS if attempts == 1 else 1  # together, then the one, then the other, which hangs
        child_of(tmp_path, pids - 1)
        time.sleep(0.5)
        parent.kill()
        parent.communicate()
    done = start(*arguments, cwd=tmp_path)
    assert (done.communicate(timeout=60), done.returncode)[1] == 3
    errors = [row["error"] for row in rows_of(tmp_path / "run")]
    assert errors == [ENDS["abort"], "ended its run 3 times, without an answer"]


# --- the same as in process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["greedy", "balanced"])
def test_the_bundled_model_answers_in_isolation_as_in_process(sampling: str, tmp_path: Path) -> None:
    options = [f"sampling={sampling}", "dataset.limit=40", "sampling.max_tokens=40", "backend.threads=1"]
    options.append("backend.reproducible=true")
    for isolation in ("true", "false"):
        llmpipe.run(compose([*options, f"backend.isolation={isolation}"]), tmp_path / isolation)
    times = ("queue_s", "first_token_s", "latency_s")
    one, other = (
        [{k: v for k, v in row.items() if k not in times} for row in rows_of(tmp_path / isolation)]
        for isolation in ("true", "false")
    )
    assert one == other
    metrics = json.loads((tmp_path / "true/metrics.json").read_text())
    inside = metrics["runner"]["isolation"]
    assert inside["restarts"] == 0
    assert 20 < inside["peak_rss_mb"] < metrics["peak_rss_mb"]
    assert 0 < inside["load_s"] < metrics["load_s"]
    assert metrics["runner"]["model_type"] == "llama 2.6M all F32"


def test_every_convenience_works_in_isolation() -> None:
    with LLMRunnerFactory.create_runner({"backend": "llama_cpp", "isolation": True, "threads": 1}) as runner:
        chat = [{"role": "user", "content": "What is 2 + 2?"}]
        assert isinstance(runner, IsolatedRunner)
        with LLMRunnerFactory.create_runner({"backend": "llama_cpp", "threads": 1}) as plain:
            assert runner.render(chat) == plain.render(chat)
            begun = [*chat, {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}]
            assert runner.render(begun, continue_final=True) == f"{plain.render(chat)}It is"
            with pytest.raises(ValueError, match="a content part of type 'image'"):
                runner.render([{"role": "user", "content": [{"type": "image"}]}])
            assert runner.chat_template == plain.chat_template
            assert runner.generate_text("What is 2 + 2?") == plain.generate_text("What is 2 + 2?")
            assert list(runner.generate_text_streaming("Tell me a story.", max_tokens=20))
            answer = runner.create_chat_completion(chat)["choices"][0]["message"]["content"]
            assert answer == plain.create_chat_completion(chat)["choices"][0]["message"]["content"]
        text = runner.generate_text_streaming("Tell me a story.", max_tokens=200, ignore_eos=True)
        next(text)
        text.close()  # type: ignore[attr-defined]
        assert runner.info()["isolation"]["restarts"] == 0
        runner.reload()
        assert runner.generate_text("What is 2 + 2?", max_tokens=5)
        assert runner.memory_usage()["rss_mb"] > psutil.Process().memory_info().rss / 1e6


def test_requests_are_pulled_when_there_is_room_and_a_little_ahead() -> None:
    pulled = 0

    def many() -> Iterator[Request]:
        nonlocal pulled
        for request in requests_of(*["a b"] * 5000):
            pulled += 1
            yield request

    with isolated(held=4, load="slow") as runner:
        stream = runner.stream(many())
        assert isinstance(next(stream), Chunk)
        assert pulled <= 4 + service.MOST_HANDED
        time.sleep(0.5)  # nobody takes what comes: nothing more is pulled
        assert pulled <= 4 + service.MOST_HANDED
        stream.close()  # type: ignore[attr-defined]
        assert runner.generate_text("goes on") == "GOES ON"


def test_an_error_of_the_source_comes_through_and_the_runner_goes_on() -> None:
    def broken() -> Iterator[Request]:
        yield from requests_of("one", "two")
        raise KeyError("mine")

    with isolated() as runner:
        with pytest.raises(KeyError, match="mine"):
            list(runner.stream(broken()))
        assert runner.generate_text("goes on") == "GOES ON"
        assert runner.info()["isolation"]["restarts"] == 0


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_backend_that_dies_while_loading_is_refused_with_how() -> None:
    with pytest.raises(LLMInitializationError, match=r"loading 'bundled' crashed the backend \(signal 11, SIGSEGV\)"):
        isolated(load="segfault")


def test_what_goes_wrong_in_the_child_is_raised_as_it_would_be_in_process() -> None:
    with pytest.raises(LLMInitializationError, match="does not exist"):
        LLMRunnerFactory.create_runner({"backend": "llama_cpp", "isolation": True, "model_path": "./nowhere.gguf"})
    with pytest.raises(LLMConfigError, match="unknown option 'thread'; did you mean 'threads'"):
        LLMRunnerFactory.create_runner({"backend": "echo", "isolation": True, "thread": 1})
    with pytest.raises(LLMConfigError, match="no module"):
        IsolatedRunner("no_such_module.Runner", BreakingConfig, {})


def test_a_row_timeout_without_isolation_is_refused() -> None:
    with pytest.raises(LLMConfigError, match=r"needs backend\.isolation=true"):
        compose(["backend.row_timeout_s=5"])
    with pytest.raises(LLMConfigError, match="a number > 0"):
        compose(["backend.isolation=true", "backend.row_timeout_s=0"])


def test_a_registered_backend_can_be_isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLMRunnerFactory, "_registered", {"breaking": Breaking})
    with LLMRunnerFactory.create_runner({"backend": "breaking", "isolation": True, "held": 3}) as runner:
        assert [c.text for c in runner.run(["a", "b c"])] == ["A", "B C"]

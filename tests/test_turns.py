"""Threads, tasks and processes that share a runner: an open stream keeps nobody out for ever."""

from __future__ import annotations

import _thread
import asyncio
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llmpipe import BaseLLMRunner, LLMInferenceError, LLMRunnerFactory
from llmpipe.runners import turns

STORY = "Tell me a story."
CHAT = [{"role": "user", "content": STORY}]
TEXT = "one two three"
WITHIN_S = 30


@pytest.fixture(scope="module", params=["echo", "isolated"])
def echo(request: pytest.FixtureRequest) -> Iterator[BaseLLMRunner]:
    with LLMRunnerFactory.create_runner({"backend": "echo", "isolation": request.param == "isolated"}) as runner:
        yield runner


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "LOOK_S", 0.05)
    monkeypatch.setattr(turns, "IDLE_S", 0.2)


def in_thread(do: Callable[[], Any]) -> Any:
    """Do something in another thread, which ends with it; a hang is a failure."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(do).result(WITHIN_S)


def raw_thread(do: Callable[[], Any]) -> None:
    """Do something in a thread that the threading module knows nothing of."""
    done = _thread.allocate_lock()
    done.acquire()

    def body() -> None:
        try:
            do()
        finally:
            done.release()

    _thread.start_new_thread(body, ())
    assert done.acquire(timeout=WITHIN_S)
    time.sleep(0.05)


OPENINGS: dict[str, Callable[[BaseLLMRunner], Iterator[Any]]] = {
    "generate_text_streaming": lambda runner: runner.generate_text_streaming(TEXT, n=1),
    "create_chat_completion": lambda runner: runner.create_chat_completion(CHAT, stream=True),
    "completions": lambda runner: runner.completions([runner.request(TEXT, id=i) for i in range(2)]),
}


def first_of(stream: Iterator[Any], kept: list[Any]) -> None:
    kept.append(stream)
    next(stream)


@pytest.mark.parametrize("run", [in_thread, raw_thread])
@pytest.mark.parametrize("opening", OPENINGS)
def test_a_thread_that_ended_with_a_stream_open_keeps_nobody_out(
    opening: str, run: Callable[[Callable[[], Any]], Any], echo: BaseLLMRunner
) -> None:
    kept: list[Any] = []
    for _ in range(3):
        run(lambda: first_of(OPENINGS[opening](echo), kept))
        assert in_thread(lambda: echo.generate_text(TEXT)) == TEXT  # a new thread, maybe of the same number
    run(lambda: first_of(OPENINGS[opening](echo), kept))
    assert echo.generate_text(TEXT) == TEXT
    for stream in kept:  # nobody takes what he has for the whole
        with pytest.raises(LLMInferenceError, match="the thread that it was in had ended; ask again"):
            list(stream)


def test_a_thread_that_ended_with_a_stream_open_keeps_nobody_out_of_a_real_model(runner: BaseLLMRunner) -> None:
    expected, kept = runner.generate_text(STORY, max_tokens=5), list[Any]()
    in_thread(lambda: first_of(runner.generate_text_streaming(STORY, ignore_eos=True), kept))
    assert in_thread(lambda: runner.generate_text(STORY, max_tokens=5)) == expected
    with pytest.raises(LLMInferenceError, match="had ended"):
        list(kept[0])


def test_who_waits_for_a_thread_goes_on_when_that_ends_with_its_stream_open(echo: BaseLLMRunner) -> None:
    begun, end, kept = threading.Event(), threading.Event(), list[Any]()

    def owner() -> None:
        first_of(OPENINGS["completions"](echo), kept)
        begun.set()
        end.wait(WITHIN_S)

    thread = threading.Thread(target=owner)
    thread.start()
    assert begun.wait(WITHIN_S)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(echo.generate_text, TEXT) for _ in range(2)]
        time.sleep(0.3)
        assert not any(one.done() for one in waiting)  # it may go on
        end.set()
        assert [one.result(WITHIN_S) for one in waiting] == [TEXT] * 2
    thread.join()


def test_a_stream_goes_from_thread_to_thread_and_others_wait_for_it(runner: BaseLLMRunner) -> None:
    expected, pieces = runner.generate_text(STORY, max_tokens=10), list[str]()
    stream = runner.generate_text_streaming(STORY, max_tokens=10)
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as other, ThreadPoolExecutor(1) as third:
        pieces += first.submit(next, stream).result(WITHIN_S), other.submit(next, stream).result(WITHIN_S)
        waiting = [first.submit(runner.generate_text, STORY, max_tokens=10)]  # began it, but does not go on with it
        waiting.append(third.submit(runner.generate_text, STORY, max_tokens=10))
        time.sleep(0.2)
        assert not any(one.done() for one in waiting)
        with pytest.raises(LLMInferenceError, match="busy with a stream of this thread"):
            other.submit(runner.generate_text, STORY).result(WITHIN_S)
        pieces += list(stream)
        assert [one.result(WITHIN_S) for one in waiting] == [expected] * 2
    assert "".join(pieces) == expected


def test_threads_that_pull_one_stream_at_once_share_its_items(echo: BaseLLMRunner) -> None:
    def requests() -> Iterator[Any]:
        for i in range(200):
            time.sleep(0.0005)
            yield echo.request(f"row {i}", id=i)

    stream = echo.completions(requests())
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda _: [one.request_id for one in stream], range(4)))
    assert sorted(sum(parts, [])) == list(range(200))


def test_a_dropped_stream_gives_the_turn_back_also_out_of_a_cycle(echo: BaseLLMRunner) -> None:
    class Box:
        def __init__(self, stream: Iterator[Any]) -> None:
            self.stream, self.own = stream, self

    for drop_in in (in_thread, lambda do: do()):
        drop_in(lambda: first_of(OPENINGS["completions"](echo), []))
        gc.disable()
        try:
            drop_in(lambda: next(Box(OPENINGS["completions"](echo)).stream))
            assert echo.generate_text(TEXT) == TEXT
        finally:
            gc.enable()


def test_closing_and_reloading_wait_for_a_stream_that_is_read_and_close_one_that_nobody_reads(
    echo: BaseLLMRunner,
) -> None:
    requests = [echo.request(f"row {i}", id=i) for i in range(10)]
    begun = threading.Event()

    def read() -> int:
        count = 0
        for _ in echo.completions(requests):
            begun.set()
            time.sleep(0.05)
            count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        assert begun.wait(WITHIN_S)
        echo.reload()
        assert reading.result(WITHIN_S) == 10
        for end in (echo.reload, echo.close):
            stream = echo.completions(requests)
            pool.submit(next, stream).result(WITHIN_S)
            in_thread(end)
            with pytest.raises(LLMInferenceError, match="closed with its runner, by another thread"):
                list(stream)
    with pytest.raises(LLMInferenceError, match=r"closed: call reload\(\) first"):
        echo.generate_text(TEXT)
    echo.reload()


def test_a_cancelled_task_gives_the_turn_back(echo: BaseLLMRunner) -> None:
    async def answer(through_threads: bool) -> None:
        stream = OPENINGS["completions"](echo)
        for _ in range(1) if through_threads else stream:
            if through_threads:
                await asyncio.to_thread(next, stream)
            await asyncio.sleep(WITHIN_S)

    async def cancelled() -> None:
        for through_threads in (False, True):
            task = asyncio.create_task(answer(through_threads))
            await asyncio.sleep(0.3)
            task.cancel()
            await asyncio.wait([task])
            del task
            assert echo.generate_text(TEXT) == TEXT
            assert await asyncio.wait_for(asyncio.to_thread(echo.generate_text, TEXT), WITHIN_S) == TEXT

    asyncio.run(cancelled())


# --- forks ------------------------------------------------------------------------------------------------------------


def in_fork(do: Callable[[], Any]) -> str:
    """Do something in a process that is forked off and ends as programs do; return what it returned or raised."""
    readable, writable = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            said = str(do())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writable, said.encode())
        gc.collect()
        os._exit(0)
    os.close(writable)
    with open(readable) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


def test_a_fork_amid_a_stream_leaves_it_to_its_process_and_the_new_one_has_a_turn(echo: BaseLLMRunner) -> None:
    requests = [echo.request(f"row {i}", id=i) for i in range(300)]
    streams = [echo.completions(requests)]
    done = [next(streams[0]).text]
    assert "LLMInferenceError: a stream cannot go on in a process that was forked" in in_fork(lambda: next(streams[0]))
    done.append(next(streams[0]).text)
    assert in_fork(lambda: echo.generate_text(TEXT)) == TEXT
    done.append(next(streams[0]).text)
    assert in_fork(streams.clear) == "None"
    assert in_fork(echo.close) == "None"
    assert done + [one.text for one in streams[0]] == [f"row {i}" for i in range(300)]
    assert echo.generate_text(TEXT) == TEXT


def test_a_fork_while_another_thread_is_at_work_is_refused_in_a_line(echo: BaseLLMRunner) -> None:
    at_work, go_on = threading.Event(), threading.Event()

    def requests() -> Iterator[Any]:
        at_work.set()
        go_on.wait(WITHIN_S)
        yield echo.request(TEXT)

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: [one.text for one in echo.completions(requests())])
        assert at_work.wait(WITHIN_S)
        said = in_fork(lambda: echo.generate_text(TEXT))
        assert said == f"LLMInferenceError: {turns.FORKED}"
        go_on.set()
        assert answer.result(WITHIN_S) == [TEXT]

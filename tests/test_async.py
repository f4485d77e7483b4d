"""Tasks that share a runner: one batch for all, errors for those they belong to, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import aclosing
from typing import Any, TypeVar

import pytest

from llmpipe import BaseLLMRunner, Chunk, EchoRunner, LLMConfigError, LLMInferenceError, LLMRunnerFactory, Request

T = TypeVar("T")
WITHIN_S = 60
STORY = "Tell me a story about a fox."
CHAT = [{"role": "user", "content": "What is the capital of France?"}]
PROMPTS = [f"Tell me a story about {what}." for what in ("a fox", "rain", "the sea", "two birds", "a lamp", "snow")]
LONG: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a program of tasks; a hang is a failure."""

    async def within() -> T:
        return await asyncio.wait_for(main, WITHIN_S)

    return asyncio.run(within())


def idle(runner: BaseLLMRunner) -> bool:
    """Say whether the runner is free again, soon."""
    until = time.monotonic() + WITHIN_S
    while runner._turns._current() is not None or runner._stepper._thread is not None:
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return not (runner._stepper._open or runner._stepper._waiting)


class Simple(BaseLLMRunner):
    """A backend of someone else's, which takes one prompt at a time: it repeats the prompt's first letter."""

    def _initialize_model(self) -> None:
        self.made = 0

    def _run_streaming(self, prompt: str, max_tokens: int, temperature: float) -> Iterator[str]:
        if prompt == "bad":
            raise ValueError("a bad prompt")
        for _ in range(max_tokens):
            self.made += 1
            time.sleep(0.001)
            yield prompt[0]


class Failing(BaseLLMRunner):
    """A backend that fails as a whole at a fatal prompt, when others wait behind that."""

    fails = True

    def _initialize_model(self) -> None: ...

    def stream(self, requests: Iterable[Request]) -> Iterator[Chunk]:
        for request in requests:
            yield Chunk(request.id, text="x")
            if request.prompt == "fatal" and self.fails:
                time.sleep(0.2)
                raise LLMInferenceError("the device is lost")
            yield Chunk(request.id, finish_reason="stop", completion_tokens=1)


@pytest.fixture(scope="module", params=["llama_cpp", "transformers", "padded", "isolated", "echo", "simple"])
def any_runner(request: pytest.FixtureRequest) -> Iterator[BaseLLMRunner]:
    configs: dict[str, dict[str, Any]] = {
        "padded": {"backend": "transformers", "batching": "padded", "device": "cpu", "threads": 1},
        "isolated": {"backend": "llama_cpp", "isolation": True, "threads": 1},
        "echo": {"backend": "echo"},
    }
    if request.param == "simple":
        yield Simple({"model": "x"})
    elif request.param in configs:
        with LLMRunnerFactory.create_runner({"temperature": 0.0, **configs[request.param]}) as runner:
            yield runner
    else:
        yield request.getfixturevalue(f"{request.param}_runner")


# --- answers ----------------------------------------------------------------------------------------------------------


def test_each_of_many_tasks_gets_what_its_prompt_gets_alone(any_runner: BaseLLMRunner) -> None:
    alone = [any_runner.generate_text(prompt, max_tokens=12) for prompt in PROMPTS]

    async def one(i: int) -> str:
        await asyncio.sleep(i % 3 * 0.01)
        if i % 2:
            return await any_runner.agenerate(PROMPTS[i], max_tokens=12)
        return "".join([piece async for piece in any_runner.astream(PROMPTS[i], max_tokens=12)])

    async def main() -> list[str]:
        return await asyncio.gather(*(one(i) for i in range(len(PROMPTS))))

    assert run(main()) == alone
    assert idle(any_runner)


def test_a_chat_completion_is_what_the_call_that_waits_returns(runner: BaseLLMRunner) -> None:
    options: dict[str, Any] = {"n": 2, "temperature": 1.0, "seed": 1, "max_tokens": 6}
    usage: Any = {"include_usage": True}

    def timeless(found: Any) -> Any:
        return {**found, "id": None, "created": None}

    async def main() -> None:
        whole = await runner.acreate_chat_completion(CHAT, **options)
        assert timeless(whole) == timeless(runner.create_chat_completion(CHAT, **options))
        stream = await runner.acreate_chat_completion(CHAT, stream=True, stream_options=usage, **options)
        pieces = [timeless(chunk) async for chunk in stream]
        waited = list(runner.create_chat_completion(CHAT, stream=True, stream_options=usage, **options))
        for index in range(2):  # how the samples' chunks lie between each other is open
            ours, theirs = (
                [c["choices"][0] for c in found if c["choices"] and c["choices"][0]["index"] == index]
                for found in (pieces, waited)
            )
            assert ours == theirs
        assert pieces[-1] == timeless(waited[-1])

    run(main())


def test_a_request_joins_a_batch_that_is_running_already(runner: BaseLLMRunner) -> None:
    async def main() -> None:
        long = [asyncio.create_task(runner.agenerate(prompt, **LONG)) for prompt in PROMPTS[:2]]
        async with aclosing(runner.astream(STORY, **LONG)) as stream:
            await anext(stream)
            assert await runner.agenerate(CHAT) == "Paris"
            await anext(stream)
        assert not any(task.done() for task in long)
        for task in long:
            task.cancel()

    run(main())
    assert idle(runner)


def test_a_request_joins_the_batch_of_a_process_of_its_own() -> None:
    with LLMRunnerFactory.create_runner({"backend": "llama_cpp", "isolation": True, "threads": 1}) as isolated:

        async def main() -> None:
            long = asyncio.create_task(isolated.agenerate(STORY, **LONG))
            async with aclosing(isolated.astream(STORY, **LONG)) as stream:
                await anext(stream)
                assert await isolated.agenerate(CHAT, temperature=0) == "Paris"
            assert not long.done()
            long.cancel()

        run(main())
        assert idle(isolated)


def test_a_long_answer_goes_on_while_short_ones_never_cease(runner: BaseLLMRunner) -> None:
    async def main() -> None:
        long = asyncio.create_task(runner.agenerate(STORY, max_tokens=24, ignore_eos=True))

        async def on_and_on(i: int) -> None:
            while not long.done():
                await runner.agenerate(f"{i} {STORY}" + " And then another one." * 8, max_tokens=1)

        tasks = [asyncio.create_task(on_and_on(i)) for i in range(64)]
        assert await long
        await asyncio.gather(*tasks)

    run(main())
    assert idle(runner)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_error_reaches_the_task_that_it_belongs_to_alone(any_runner: BaseLLMRunner) -> None:
    bad: Any = "bad" if isinstance(any_runner, Simple) else [{"role": "user", "content": 5}]

    async def main() -> list[Any]:
        tasks = [any_runner.agenerate(prompt, max_tokens=3) for prompt in (STORY, bad, STORY)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, error, last = run(main())
    assert first == last != ""
    assert isinstance(error, LLMInferenceError)
    assert ("a bad prompt" if isinstance(any_runner, Simple) else "a number as content") in str(error)
    with pytest.raises(LLMConfigError, match="did you mean 'temperature'"):
        any_runner.astream(STORY, temprature=1)  # type: ignore[call-arg]


def test_a_fault_of_the_whole_runner_reaches_all_and_the_next_ones_are_run() -> None:
    failing = Failing({"model": "x"})

    async def main() -> None:
        found = await asyncio.gather(
            *(failing.agenerate(prompt) for prompt in ("a", "fatal", "b", "c")), return_exceptions=True
        )
        assert found[0] == "x"
        assert [str(error) for error in found[1:]] == ["the device is lost"] * 3
        failing.fails = False
        assert await failing.agenerate("fatal") == "x"

    run(main())
    assert idle(failing)


def test_what_is_no_exception_ends_neither_loops_nor_the_runner() -> None:
    class Panicking(Failing):
        def stream(self, requests: Iterable[Request]) -> Iterator[Chunk]:
            for chunk in super().stream(requests):
                if self.fails:
                    raise SystemExit(3)
                yield chunk

    panicking = Panicking({"model": "x"})

    async def main() -> None:
        found = await asyncio.gather(*(panicking.agenerate(prompt) for prompt in "ab"), return_exceptions=True)
        assert [repr(error) for error in found] == [repr(LLMInferenceError("the backend raised SystemExit(3)"))] * 2
        panicking.fails = False
        assert await panicking.agenerate("a") == "x" == await asyncio.to_thread(panicking.generate_text, "a")

    run(main())
    assert idle(panicking)


@pytest.mark.parametrize("answers", [[], [Chunk(9, text="x", finish_reason="stop")]])
def test_text_that_has_no_end_is_no_answer(answers: list[Chunk]) -> None:
    class Strange(Failing):
        def stream(self, requests: Iterable[Request]) -> Iterator[Chunk]:
            for request in requests:
                yield Chunk(request.id, text="x")
                yield from answers

    strange = Strange({"model": "x"})
    reason = "which is not waiting for one" if answers else "ended without an answer"
    for call in (strange.generate_text, lambda prompt: list(strange.create_chat_completion(CHAT, stream=True))):
        with pytest.raises(LLMInferenceError, match=reason):
            call("a")
    with pytest.raises(LLMInferenceError, match="ended without an answer"):
        run(strange.agenerate("a"))


def test_closing_ends_those_who_wait_and_those_who_come(any_runner: BaseLLMRunner) -> None:
    async def main() -> None:
        tasks = [asyncio.create_task(any_runner.agenerate(prompt, max_tokens=400)) for prompt in PROMPTS * 8]
        await asyncio.sleep(0.02)
        await asyncio.to_thread(any_runner.close)
        for error in [found for found in await asyncio.gather(*tasks, return_exceptions=True) if found not in echoed]:
            assert "the runner was closed before the answer was complete" in str(error)
        with pytest.raises(LLMInferenceError, match=r"closed: call reload\(\) first"):
            await any_runner.agenerate(STORY)

    echoed = PROMPTS if isinstance(any_runner, EchoRunner) else []  # it is done before it can be closed
    try:
        run(main())
        assert idle(any_runner)
    finally:
        any_runner.reload()
    assert any_runner.generate_text(STORY, max_tokens=2)


# --- tasks that leave -------------------------------------------------------------------------------------------------


def test_a_cancelled_task_gives_its_request_up_and_the_others_go_on(any_runner: BaseLLMRunner) -> None:
    expected = any_runner.generate_text(STORY, max_tokens=8)

    async def main() -> None:
        long = [asyncio.create_task(any_runner.agenerate(prompt, **LONG)) for prompt in PROMPTS]
        other = asyncio.create_task(any_runner.agenerate(STORY, max_tokens=8))
        await asyncio.sleep(0.05)
        for task in long:
            task.cancel()
        assert await other == expected

    if not isinstance(any_runner, Simple):  # it has no such option
        run(main())
    assert idle(any_runner)


def test_nothing_is_computed_for_nobody_where_a_backend_cannot_cancel() -> None:
    simple = Simple({"model": "x"})

    async def both() -> None:
        first = asyncio.create_task(simple.agenerate("a", max_tokens=10_000))
        await asyncio.sleep(0.1)
        second = asyncio.create_task(simple.agenerate("b", max_tokens=2))
        await asyncio.sleep(0.05)
        first.cancel()
        assert await second == "bb"

    run(both())
    assert idle(simple) and simple.made < 1000


@pytest.mark.parametrize("way", ["break", "raise"])
def test_leaving_a_stream_gives_its_request_up(way: str, runner: BaseLLMRunner) -> None:
    async def main() -> None:
        try:
            async for _ in runner.astream(STORY, **LONG):
                if way == "break":
                    break
                raise KeyError("mine")
        except KeyError:
            pass
        started = time.perf_counter()
        assert await asyncio.to_thread(runner.generate_text, CHAT) == "Paris"
        assert time.perf_counter() - started < 5

    run(main())
    assert idle(runner)


def test_a_closed_loop_leaves_the_runner_free_and_a_program_ends_whatever_it_left_undone() -> None:
    program = (
        "import asyncio, llmpipe\n"
        "runner = llmpipe.LLMRunnerFactory.create_runner({'backend': 'llama_cpp', 'threads': 1})\n"
        "loop = asyncio.new_event_loop()\n"
        "tasks = [loop.create_task(runner.agenerate('hi', max_tokens=400, ignore_eos=True)) for _ in range(3)]\n"
        "loop.run_until_complete(asyncio.sleep(0.05))\n"
        "loop.close()\n"
        "print(runner.generate_text('What is the capital of France?', temperature=0))\n"
        "loop = asyncio.new_event_loop()\n"
        "tasks += [loop.create_task(runner.agenerate('hi', max_tokens=400, ignore_eos=True)) for _ in range(3)]\n"
        "loop.run_until_complete(asyncio.sleep(0.05))\n"
        "left = runner.generate_text_streaming('hi')\n"
        "next(left)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=WITHIN_S)
    assert (done.returncode, done.stdout) == (0, "Paris\n"), done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is forked there")
def test_a_process_forked_off_meanwhile_is_refused_and_does_not_hang() -> None:
    program = (
        "import asyncio, os, signal, threading, llmpipe\n"
        "runner = llmpipe.LLMRunnerFactory.create_runner({'backend': 'llama_cpp', 'threads': 1})\n"
        "def ask(): print(asyncio.run(asyncio.wait_for(runner.agenerate('hi'), 20)), flush=True)\n"
        "async def main():\n"
        "    task = asyncio.create_task(runner.agenerate('hi', max_tokens=400, ignore_eos=True))\n"
        "    await asyncio.sleep(0.1)\n"
        "    if not (child := os.fork()):\n"
        "        signal.alarm(20)\n"
        "        thread = threading.Thread(target=ask)\n"
        "        thread.start(), thread.join(), os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "    assert await task\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=WITHIN_S)
    assert done.returncode == 0, done.stderr
    assert "this runner was at work when this process was forked off" in done.stderr


def test_a_program_ends_where_others_wait_for_a_stream_that_its_main_thread_left_open() -> None:
    program = (
        "import asyncio, threading, llmpipe\n"
        "runner = llmpipe.LLMRunnerFactory.create_runner({'backend': 'llama_cpp', 'threads': 1})\n"
        "left = runner.generate_text_streaming('hi', max_tokens=400, ignore_eos=True)\n"
        "next(left)\n"
        "ask = lambda: print(asyncio.run(runner.agenerate('What is the capital of France?', temperature=0)))\n"
        "threading.Thread(target=ask).start()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=WITHIN_S)
    assert (done.returncode, done.stdout) == (0, "Paris\n"), done.stderr


# --- beside others ----------------------------------------------------------------------------------------------------


def test_loops_in_several_threads_share_the_runner(any_runner: BaseLLMRunner) -> None:
    expected = any_runner.generate_text(STORY, max_tokens=8)
    found: list[list[str]] = []

    async def several() -> list[str]:
        return await asyncio.gather(*(any_runner.agenerate(STORY, max_tokens=8) for _ in range(3)))

    threads = [threading.Thread(target=lambda: found.append(run(several()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WITHIN_S)
    assert found == [[expected] * 3] * 3
    assert idle(any_runner)


def test_a_call_that_is_not_asynchronous_has_its_turn_among_tasks_that_never_cease(runner: BaseLLMRunner) -> None:
    async def main() -> None:
        stop = False

        async def on_and_on() -> None:
            while not stop:
                await runner.agenerate(STORY, max_tokens=10)

        tasks = [asyncio.create_task(on_and_on()) for _ in range(4)]
        await asyncio.sleep(0.05)
        for _ in range(3):
            assert await asyncio.to_thread(runner.generate_text, CHAT) == "Paris"
        assert runner.generate_text(CHAT) == "Paris"  # and in the loop's own thread
        stop = True
        await asyncio.gather(*tasks)

    run(main())
    assert idle(runner)


def test_tasks_wait_for_a_stream_of_another_thread_and_are_refused_by_one_of_their_own(runner: BaseLLMRunner) -> None:
    async def main() -> None:
        before = asyncio.create_task(runner.agenerate(STORY, max_tokens=3))
        await asyncio.sleep(0)
        stream = runner.generate_text_streaming(STORY, **LONG)
        next(stream)
        assert await before
        with pytest.raises(LLMInferenceError, match="busy with a stream of this thread"):
            await runner.agenerate(STORY)
        elsewhere = asyncio.create_task(asyncio.to_thread(run, runner.agenerate(CHAT)))
        await asyncio.sleep(0.1)
        assert not elsewhere.done()
        list(stream)
        assert await elsewhere == "Paris"

    run(main())
    assert idle(runner)


def test_a_task_that_waits_for_its_turn_can_be_cancelled(runner: BaseLLMRunner) -> None:
    opened, close = threading.Event(), threading.Event()

    def hold() -> None:
        stream = runner.generate_text_streaming(STORY)
        next(stream)
        opened.set()
        close.wait(WITHIN_S)
        list(stream)

    thread = threading.Thread(target=hold)
    thread.start()
    opened.wait(WITHIN_S)

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(runner.agenerate(STORY), 0.1)

    run(main())
    until = time.monotonic() + 5
    while runner._stepper._thread is not None and time.monotonic() < until:
        time.sleep(0.01)
    assert runner._stepper._thread is None
    close.set()
    thread.join(WITHIN_S)
    assert idle(runner)


def test_reloading_waits_for_what_is_in_flight(runner: BaseLLMRunner) -> None:
    expected = runner.generate_text(STORY, max_tokens=30)

    async def main() -> None:
        task = asyncio.create_task(runner.agenerate(STORY, max_tokens=30))
        await asyncio.sleep(0)
        await asyncio.to_thread(runner.reload)
        assert await task == expected
        assert await runner.agenerate(STORY, max_tokens=30) == expected

    run(main())


def test_a_stream_that_was_asked_for_before_a_reload_is_of_the_model_after_it(runner: BaseLLMRunner) -> None:
    stream = runner.generate_text_streaming(CHAT)
    runner.reload()
    assert "".join(stream) == "Paris"

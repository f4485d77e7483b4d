"""Tasks that ask at once against tasks that ask one after the other, on the bundled model: tokens per second.

    python benchmarks/bench_async.py                      # both backends; a minute on one core
    python benchmarks/bench_async.py --rounds 5 --rows 32

`alone` awaits each answer before it asks for the next; `together` asks for all of them with `asyncio.gather`; `run` is
the call for a list of prompts, which needs no event loop. Each has the same 16 prompts and 64 tokens for each.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from harness import THREADS, Benchmark, Contestant, Figures, Line, Setting, main, speed

ROWS = 16
MAX_TOKENS = 64
BACKENDS = ("llama_cpp", "transformers")
OPTIONS: dict[str, Any] = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}


def ask(way: Callable[[Any, list[str]], None], backend: str, setting: Setting) -> Figures:
    """Ask all prompts one way, after once to warm up."""
    from llmpipe import LLMRunnerFactory

    prompts = [f"Tell me story {i} about a fox and a violin." for i in range(setting.rows or ROWS)]
    config = {"backend": backend, "device": setting.device, "threads": THREADS}
    with LLMRunnerFactory.create_runner(config) as runner:
        way(runner, prompts)
        started = time.perf_counter()
        way(runner, prompts)
        return speed(time.perf_counter() - started, len(prompts) * MAX_TOKENS)


def alone(runner: Any, prompts: list[str]) -> None:
    """Await one answer after the other."""

    async def one_by_one() -> None:
        for prompt in prompts:
            await runner.agenerate(prompt, **OPTIONS)

    asyncio.run(one_by_one())


def together(runner: Any, prompts: list[str]) -> None:
    """Await all answers at once."""

    async def all_at_once() -> None:
        await asyncio.gather(*(runner.agenerate(prompt, **OPTIONS) for prompt in prompts))

    asyncio.run(all_at_once())


def run(runner: Any, prompts: list[str]) -> None:
    """Have a list answered."""
    runner.run(prompts, **OPTIONS)


CONTESTANTS = {
    f"{backend} {name}": Contestant(partial(ask, way, backend))
    for backend in BACKENDS
    for name, way in (("alone", alone), ("together", together), ("run", run))
}
LINES = [
    line
    for backend in BACKENDS
    for line in (
        Line(f"{backend}, tokens/s one after the other", f"{backend} alone", pattern="{:,.0f}"),
        Line(f"{backend}, tokens/s of {ROWS} at once", f"{backend} together", pattern="{:,.0f}"),
        Line(f"{backend}, at once against one after the other", f"{backend} together", f"{backend} alone"),
        Line(f"{backend}, at once against `run`", f"{backend} together", f"{backend} run"),
    )
]

if __name__ == "__main__":
    sys.exit(
        main(Benchmark(__doc__, lambda setting: None, CONTESTANTS, LINES, models=["bundled"], devices=("cpu", "cuda")))
    )

"""llmpipe's llama.cpp backend against the ways its users know, on this machine.

    python benchmarks/bench_llama_cpp.py                 # everything; about an hour on two cores
    python benchmarks/bench_llama_cpp.py --models S      # the small model only
    python benchmarks/bench_llama_cpp.py --contestants llmpipe,server --rounds 5

Contestants run one after another, round by round, each in a process of its own; figures are medians, claims are ratios
within a round. `llama-server` and `llama-batched-bench` are used where they are on the PATH (or in $LLAMA_BIN).
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import psutil
from harness import (
    THREADS,
    Benchmark,
    Contestant,
    Figures,
    Line,
    Setting,
    Skipped,
    main,
    peak_rss_mb,
    run_llmpipe,
    speed,
)
from models import SHAPES, gguf_path, write_gguf
from workload import Job, shared, skewed

ROWS = {"S": 256, "M": 100}
SLOTS = {"S": 32, "M": 16}
"""Sequences that the ceiling is measured with: as many as llmpipe chooses."""
SERVER_SLOTS = 16
REPEATS = 3
"""Times that llama-batched-bench measures, after once to warm up."""
MEMORY_ROWS = 100


def prepare(setting: Setting) -> None:
    """Make the models."""
    names = ["S", "S-Q8_0"] if setting.model == "S" else [setting.model]  # in F16 no reproducibility is promised
    for name in names:
        write_gguf(gguf_path(setting.work, name), SHAPES[name])


def path_of(setting: Setting) -> str:
    """Return the model's file."""
    return str(gguf_path(setting.work, setting.model))


def rows_of(setting: Setting) -> int:
    """Return how many rows a run has."""
    return setting.rows or ROWS[setting.model]


# --- contestants ------------------------------------------------------------------------------------------------------


def ours(setting: Setting) -> Figures:
    """Run llmpipe, as the pipeline runs it."""
    return ours_on(setting, skewed(rows_of(setting)))


def ours_on(setting: Setting, jobs: list[Job], n: int = 1, temperature: float = 0.0, **options: Any) -> Figures:
    """Run jobs through llmpipe's runner."""
    from llmpipe import LlamaCppRunner
    from llmpipe.runners.llama_cpp.context import LlamaContext

    config = {"model": path_of(setting), "threads": THREADS, **options}
    with LlamaCppRunner(config, "cpu") as runner, timed(LlamaContext, "compute") as inside:
        figures = run_llmpipe(runner, jobs, n, temperature)
        contexts = runner.info()["context_s"]
    return figures | {
        "outside_decode": 1 - sum(inside) / figures["wall_s"],
        "outside_decode_and_contexts": 1 - (sum(inside) + contexts) / figures["wall_s"],
    }


@contextmanager
def timed(owner: type, method: str) -> Iterator[list[float]]:
    """Yield the seconds that each call of a method takes, as they come."""
    function, seconds = getattr(owner, method), []

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args)
        finally:
            seconds.append(time.perf_counter() - started)

    setattr(owner, method, call)
    try:
        yield seconds
    finally:
        setattr(owner, method, function)


def loop(setting: Setting, **options: Any) -> Figures:
    """Run `Llama.create_completion` row after row."""
    from llama_cpp import Llama

    jobs = skewed(rows_of(setting))
    llama = Llama(path_of(setting), n_ctx=1024, verbose=False, **options)
    started = time.perf_counter()
    tokens = 0
    for job in jobs:
        done: Any = llama.create_completion(list(job.prompt.encode()), max_tokens=job.max_tokens, temperature=0.0)
        tokens += done["usage"]["completion_tokens"]
    return speed(time.perf_counter() - started, tokens)


def loop_matched(setting: Setting) -> Figures:
    """Run the loop with our number of threads."""
    return loop(setting, n_threads=THREADS, n_threads_batch=THREADS)


def server(setting: Setting) -> Figures:
    """Run llama-server with 16 slots and a client that keeps 16 requests in flight."""
    program = find_program("llama-server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [program, "-m", path_of(setting), "-np", str(SERVER_SLOTS), "-c", str(SERVER_SLOTS * 1024)]
    command += ["-t", str(THREADS), "-tb", str(THREADS), "-ngl", "0", "--no-webui"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        jobs = skewed(rows_of(setting))
        started = time.perf_counter()
        tokens = asyncio.run(ask_all(f"http://127.0.0.1:{port}/completion", jobs))
        wall = time.perf_counter() - started
        return speed(wall, tokens) | {"peak_rss_mb": peak_rss_mb(process.pid)}
    finally:
        process.kill()
        process.wait()


async def ask_all(url: str, jobs: list[Job]) -> int:
    """Send all jobs, as many at once as the server has slots; return the tokens generated."""
    pool = ThreadPoolExecutor(SERVER_SLOTS)

    def ask(job: Job) -> int:
        body = {"prompt": list(job.prompt.encode()), "n_predict": job.max_tokens, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            url, json.dumps({**body, "cache_prompt": False}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return int(json.loads(answer.read())["tokens_predicted"])

    running = asyncio.get_running_loop()
    return sum(await asyncio.gather(*(running.run_in_executor(pool, ask, job) for job in jobs)))


def wait_for(url: str) -> None:
    """Wait until a server answers."""
    for _ in range(600):
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(url)


def ceiling(setting: Setting) -> Figures:
    """Ask llama-batched-bench what these shapes can reach: prompts and answers in separate phases, always full.

    It is noisy: the figure is the mean of several measurements in one process, the first of which only warms it up.
    """
    program = find_program("llama-batched-bench")
    jobs = skewed(rows_of(setting))
    prompt = round(statistics.mean(len(job.prompt) for job in jobs))
    answer = round(statistics.mean(job.max_tokens for job in jobs))
    slots = SLOTS[setting.model]
    command = [program, "-m", path_of(setting), "-c", str(slots * 1024), "-t", str(THREADS), "-tb", str(THREADS)]
    command += ["-npp", str(prompt), "-ntg", str(answer), "-npl", ",".join([str(slots)] * (1 + REPEATS))]
    command += ["-ngl", "0", "--output-format", "jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")][1:]
    prompt_s = statistics.mean(each["t_pp"] for each in measured) / (slots * prompt)
    answer_s = statistics.mean(each["t_tg"] for each in measured) / (slots * answer)
    prompts, answers = sum(len(job.prompt) for job in jobs), sum(job.max_tokens for job in jobs)
    wall = prompts * prompt_s + answers * answer_s
    return {"wall_s": wall, "tokens": answers, "tokens_per_s": answers / wall}


def prefixes(setting: Setting, same: bool, **options: Any) -> Figures:
    """Rows with one 256-token prefix, or with one each."""
    return ours_on(setting, shared(rows_of(setting), 256, 32, 48, same), **options)


def samples(setting: Setting) -> Figures:
    """Eight samples of each of a few 256-token prompts."""
    return ours_on(setting, shared(max(1, rows_of(setting) // 16), 224, 32, 48, same=False), n=8, temperature=0.8)


def sample_rows(setting: Setting) -> Figures:
    """As many answers to prompts that share nothing."""
    return ours_on(setting, shared(max(1, rows_of(setting) // 16) * 8, 224, 32, 48, same=False), temperature=0.8)


def reproducible(setting: Setting) -> Figures:
    """Count the rows that change with batch size and order, greedy and seeded, in reproducible mode, in Q8_0."""
    from llmpipe import LlamaCppRunner, Request, SamplingConfig

    path = gguf_path(setting.work, "S-Q8_0" if setting.model == "S" else setting.model)
    jobs = [Job(job.prompt, min(job.max_tokens, 24)) for job in skewed(setting.rows or 100)]
    changed = {}
    ways = (("1 slot", 1, 1), ("4 slots", 4, 1), ("16 slots", 16, 1), ("16 slots, reversed", 16, -1))
    for temperature in (0.0, 0.8):
        answers: dict[str, dict[int, str | None]] = {}
        for label, slots, order in ways:
            config = {"model": str(path), "slots": slots, "reproducible": True, "threads": THREADS}
            with LlamaCppRunner(config, "cpu") as runner:
                requests = [
                    Request(
                        i, SamplingConfig(temperature=temperature, max_tokens=j.max_tokens), prompt=j.prompt, seed=i
                    )
                    for i, j in enumerate(jobs)
                ]
                done = list(runner.completions(requests[::order]))
                assert all(c.error is None for c in done)
                answers[label] = {c.request_id: c.text for c in done}
        alone = answers.pop("1 slot")
        for label, found in answers.items():
            changed[f"temperature {temperature}, {label}"] = sum(found[i] != alone[i] for i in alone)
    return {"rows": len(jobs), "changed": max(changed.values()), "changed_in": changed}


def memory(setting: Setting, times: int) -> Figures:
    """Compare what llmpipe's process grows by with the buffers that llama.cpp reports: weights, KV, compute, output."""
    import llama_cpp  # noqa: F401  loaded before the measuring begins

    import llmpipe.runners.llama_cpp  # noqa: F401

    buffers = BufferLog()
    logger = logging.getLogger("llmpipe.llama_cpp")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(buffers)
    before = psutil.Process().memory_info().rss / 1e6
    figures = ours_on(setting, skewed(times * (setting.rows or MEMORY_ROWS)))
    grown = figures["peak_rss_mb"] - before
    found = buffers.peak_mb()
    return figures | {"interpreter_mb": before, "grown_mb": grown, "buffers_mb": found, "of_buffers": grown / found}


class BufferLog(logging.Handler):
    """Adds up the buffers that llama.cpp reports in its log."""

    SIZE = re.compile(r"(\S+)\s+(model|KV|compute|output) buffer size =\s+([\d.]+) MiB")

    def __init__(self) -> None:
        super().__init__()
        self._weights = 0.0
        self._contexts: list[dict[tuple[str, str], float]] = []
        """Buffer → MiB, for each context made."""

    def emit(self, record: logging.LogRecord) -> None:
        """Take note of one line."""
        line = record.getMessage()
        if "constructing llama_context" in line:
            self._contexts.append({})
        elif found := self.SIZE.search(line):
            device, kind, size = found.groups()
            if kind == "model":
                self._weights += float(size)
            else:
                self._contexts[-1][device, kind] = float(size)  # a compute buffer that is made anew replaces the old

    def peak_mb(self) -> float:
        """Return the weights and the largest context, in MB; there is one context at a time."""
        return (self._weights + max(sum(context.values()) for context in self._contexts)) * 2**20 / 1e6


def find_program(name: str) -> str:
    """Return where a program of llama.cpp is.

    Raises:
        Skipped: it is not there.
    """
    found = shutil.which(name, path=os.environ.get("LLAMA_BIN", "") + os.pathsep + os.environ.get("PATH", ""))
    if found is None:
        raise Skipped(f"{name} is not on the PATH")
    return found


PERCENT, COUNT, MB = "{:.1%}", "{:,.0f}", "{:,.0f} MB"
BENCHMARK = Benchmark(
    description=__doc__,
    prepare=prepare,
    models="S,M",
    contestants={
        "llmpipe": Contestant(ours),
        "loop": Contestant(loop_matched),
        "loop-defaults": Contestant(loop),
        "server": Contestant(server),
        "ceiling": Contestant(ceiling),
        "shared-prefix": Contestant(partial(prefixes, same=True)),
        "own-prefixes": Contestant(partial(prefixes, same=False)),
        "shared-prefix-no-flash": Contestant(partial(prefixes, same=True, flash_attention="off")),
        "own-prefixes-no-flash": Contestant(partial(prefixes, same=False, flash_attention="off")),
        "samples": Contestant(samples),
        "sample-rows": Contestant(sample_rows),
        "memory": Contestant(partial(memory, times=1), once=True),
        "memory-4x": Contestant(partial(memory, times=4), once=True),
        "reproducible": Contestant(reproducible, once=True),
    },
    lines=[
        Line("llmpipe, generated tokens/s", "llmpipe", pattern=COUNT),
        Line("against a `Llama.create_completion` loop, threads matched", "llmpipe", "loop"),
        Line("against the same with its default threads", "llmpipe", "loop-defaults"),
        Line(f"against `llama-server -np {SERVER_SLOTS}`, {SERVER_SLOTS} requests in flight", "llmpipe", "server"),
        Line("against `llama-batched-bench` at the mean lengths", "llmpipe", "ceiling"),
        Line("a shared 256-token prefix against none shared", "shared-prefix", "own-prefixes"),
        Line("the same, flash attention off", "shared-prefix-no-flash", "own-prefixes-no-flash"),
        Line("8 samples of a 256-token prompt against 8 rows", "samples", "sample-rows"),
        Line("time outside `llama_decode`", "llmpipe", figure="outside_decode", pattern=PERCENT),
        Line("the same without making contexts", "llmpipe", figure="outside_decode_and_contexts", pattern=PERCENT),
        Line("memory beyond the interpreter", "memory", figure="grown_mb", pattern=MB),
        Line("weights, KV cache and buffers that llama.cpp reports", "memory", figure="buffers_mb", pattern=MB),
        Line("the former against the latter", "memory", figure="of_buffers"),
        Line("the same with four times the rows", "memory-4x", figure="of_buffers"),
        Line("memory with four times the rows, against once", "memory-4x", "memory", figure="grown_mb"),
        Line("the interpreter itself", "memory", figure="interpreter_mb", pattern=MB),
        Line("most rows changed in reproducible mode", "reproducible", figure="changed", pattern=COUNT),
    ],
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))

"""Beside busy neighbours: how fast llmpipe loads and generates while other processes want the processors too.

    python benchmarks/bench_neighbours.py                                         # a quarter of an hour on two cores
    python benchmarks/bench_neighbours.py --contestants llama_cpp,llama_cpp-one   # some of it

A neighbour is a process in an endless loop, at the same priority. `llmpipe` is what a user gets; beside it stand one
thread, a thread per core that sleeps at once when it waits, and a thread per core that waits as OpenMP has it by
default. Set OMP_NUM_THREADS, OMP_WAIT_POLICY and their like for none of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from harness import THREADS, Benchmark, Contestant, Figures, Line, Setting, main, run_llmpipe
from models import SHAPES, checkpoint_path, gguf_path, write_checkpoint, write_gguf
from workload import Job, letters

ROWS, PROMPT, ANSWER = 8, 24, 16
BACKENDS = ("llama_cpp", "transformers")
NEIGHBOURS = (0, 1, 2)
SETTLE_S = 1.0
"""How long it loads and runs beside its neighbours, at least, before its speed is measured."""
WAYS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "": ({}, {}),
    "-one": ({}, {"threads": 1}),
    "-passive": ({"OMP_WAIT_POLICY": "PASSIVE"}, {"threads": THREADS}),
    "-spinning": ({"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}, {"threads": THREADS}),
}
"""Variables and options of each way to use the processors."""


def prepare(setting: Setting) -> None:
    """Make the model for both backends."""
    write_gguf(gguf_path(setting.work, setting.model), SHAPES[setting.model])
    write_checkpoint(checkpoint_path(setting.work, setting.model, "float32"), SHAPES[setting.model], "float32", "cpu")


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Let so many processes run in endless loops."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(setting: Setting, backend: str, variables: dict[str, str], options: dict[str, Any]) -> Figures:
    """Load and generate beside each number of neighbours."""
    os.environ.update(variables)  # before OpenMP is loaded
    from llmpipe import LLMRunnerFactory

    paths = {"llama_cpp": gguf_path(setting.work, setting.model)}
    paths["transformers"] = checkpoint_path(setting.work, setting.model, "float32")
    random = np.random.default_rng(0)
    jobs = [Job(letters(random, PROMPT), ANSWER) for _ in range(setting.rows or ROWS)]
    config = {"backend": backend, "model_path": str(paths[backend]), "device": "cpu", **options}
    figures: Figures = {}
    with LLMRunnerFactory.create_runner({"llm": config}) as runner:
        for count in NEIGHBOURS:
            with neighbours(count):
                started = time.perf_counter()
                runner.reload()
                figures[f"load_s_{count}"] = time.perf_counter() - started
                while time.perf_counter() < started + SETTLE_S:
                    run_llmpipe(runner, jobs[:2])
                figures[f"beside_{count}"] = run_llmpipe(runner, jobs)["tokens_per_s"]
                figures[f"kept_{count}"] = figures[f"beside_{count}"] / figures["beside_0"]
                figures[f"threads_{count}"] = runner.info()["threads"]
    return figures


def lines(backend: str) -> Iterator[Line]:
    """Yield the lines of the table that are a backend's."""
    others = {"one": "one thread", "passive": "a thread per core, asleep when waiting", "spinning": "OpenMP's defaults"}
    for count in NEIGHBOURS:
        beside = f"{backend} beside {count}"
        yield Line(f"{beside}: generated tokens/s", backend, figure=f"beside_{count}", pattern="{:.1f}")
        if count:
            yield Line(f"{beside}, against none", backend, figure=f"kept_{count}")
            yield Line("OpenMP's defaults, against none", f"{backend}-spinning", figure=f"kept_{count}")
        for way, name in others.items():
            yield Line(f"{beside}, against {name}", backend, f"{backend}-{way}", figure=f"beside_{count}")
        yield Line(f"{beside}: loading, s", backend, figure=f"load_s_{count}", pattern="{:.1f}")


BENCHMARK = Benchmark(
    description=__doc__,
    prepare=prepare,
    models="M",
    contestants={
        backend + way: Contestant(partial(measure, backend=backend, variables=variables, options=options))
        for backend in BACKENDS
        for way, (variables, options) in WAYS.items()
    },
    lines=[line for backend in BACKENDS for line in lines(backend)],
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))

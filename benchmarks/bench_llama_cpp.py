"""llmpipe's llama.cpp backend against the ways its users know, on this machine.

    python benchmarks/bench_llama_cpp.py                 # everything; about half an hour on two cores
    python benchmarks/bench_llama_cpp.py --models S      # the small model only

Contestants run one after another, round by round, each in a process of its own; figures are medians, claims are ratios
within a round. `llama-server` and `llama-batched-bench` are used where they are on the PATH (or in $LLAMA_BIN).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from models import SHAPES, write_gguf
from workload import Job, shared, skewed

HERE = Path(__file__).parent
THREADS = psutil.cpu_count(logical=False) or 1
ROWS = {"S": 256, "M": 100}
SERVER_SLOTS = 16


def main() -> None:
    """Run all contestants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="S,M", help="comma-separated: S, M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("/tmp/llmpipe-benchmarks"), help="where models are made")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "llama_cpp.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, model = arguments.one.split(":")
        print(json.dumps(CONTESTANTS[name](arguments.work / f"{model}.gguf", model)))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for model in arguments.models.split(","):
        write_gguf(arguments.work / f"{model}.gguf", SHAPES[model])
        results[model] = {name: [] for name in CONTESTANTS}
        for round_number in range(arguments.rounds):
            for name in CONTESTANTS:
                if name in ONCE and round_number:
                    continue
                found = in_process(name, model, arguments.work)
                results[model][name].append(found)
                print(f"{model} round {round_number + 1} {name}: {found}", file=sys.stderr, flush=True)
    report = {"machine": machine(), "results": results}
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(results))


def in_process(name: str, model: str, work: Path) -> dict[str, Any]:
    """Run one contestant in a process of its own."""
    command = [sys.executable, __file__, "--work", str(work), "--one", f"{name}:{model}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


# --- contestants ------------------------------------------------------------------------------------------------------


def ours(path: Path, model: str) -> dict[str, Any]:
    """Run llmpipe, as the pipeline runs it."""
    return ours_on(path, skewed(ROWS[model]))


def ours_on(path: Path, jobs: list[Job], n: int = 1, temperature: float = 0.0, **options: Any) -> dict[str, Any]:
    """Run jobs through llmpipe's runner."""
    from llmpipe import LlamaCppRunner, Request, SamplingConfig
    from llmpipe.config import LlamaCppConfig

    with LlamaCppRunner(LlamaCppConfig(model=str(path), threads=THREADS, **options), "cpu") as runner:
        requests = [
            Request(
                i,
                SamplingConfig(temperature=temperature, max_tokens=job.max_tokens, ignore_eos=True, n=n),
                prompt=job.prompt,
                samples=tuple(range(n)),
            )
            for i, job in enumerate(jobs)
        ]
        started = time.perf_counter()
        done = list(runner.completions(requests))
        wall = time.perf_counter() - started
        info = runner.info()
    tokens = sum(c.completion_tokens or 0 for c in done)
    return {
        "wall_s": wall,
        "tokens_per_s": tokens / wall,
        "tokens": tokens,
        "outside_decode": 1 - info["decode_s"] / wall,
        "slots": info["slots"],
        "cached": sum(c.cached_prompt_tokens or 0 for c in done),
        "peak_rss_mb": peak_rss_mb(),
    }


def loop(path: Path, model: str, **options: Any) -> dict[str, Any]:
    """Run `Llama.create_completion` row after row."""
    from llama_cpp import Llama

    jobs = skewed(ROWS[model])
    llama = Llama(str(path), n_ctx=1024, verbose=False, **options)
    started = time.perf_counter()
    tokens = 0
    for job in jobs:
        done: Any = llama.create_completion(list(job.prompt.encode()), max_tokens=job.max_tokens, temperature=0.0)
        tokens += done["usage"]["completion_tokens"]
    wall = time.perf_counter() - started
    return {"wall_s": wall, "tokens_per_s": tokens / wall, "tokens": tokens, "peak_rss_mb": peak_rss_mb()}


def loop_matched(path: Path, model: str) -> dict[str, Any]:
    """Run the loop with our number of threads."""
    return loop(path, model, n_threads=THREADS, n_threads_batch=THREADS)


def server(path: Path, model: str) -> dict[str, Any]:
    """Run llama-server with 16 slots and a client that keeps 16 requests in flight."""
    program = find_program("llama-server")
    if program is None:
        return {"skipped": "llama-server is not on the PATH"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [program, "-m", str(path), "-np", str(SERVER_SLOTS), "-c", str(SERVER_SLOTS * 1024), "-t", str(THREADS)]
    command += ["-tb", str(THREADS), "--host", "127.0.0.1", "--port", str(port), "-ngl", "0", "--no-webui"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        jobs = skewed(ROWS[model])
        started = time.perf_counter()
        tokens = asyncio.run(ask_all(f"http://127.0.0.1:{port}/completion", jobs))
        wall = time.perf_counter() - started
        memory = psutil.Process(process.pid).memory_info().rss / 1e6
    finally:
        process.kill()
        process.wait()
    return {"wall_s": wall, "tokens_per_s": tokens / wall, "tokens": tokens, "peak_rss_mb": memory}


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


def ceiling(path: Path, model: str) -> dict[str, Any]:
    """Ask llama-batched-bench what these shapes can reach: prompts and answers in separate phases, always full."""
    program = find_program("llama-batched-bench")
    if program is None:
        return {"skipped": "llama-batched-bench is not on the PATH"}
    jobs = skewed(ROWS[model])
    prompt = round(statistics.mean(len(job.prompt) for job in jobs))
    answer = round(statistics.mean(job.max_tokens for job in jobs))
    slots = {"S": 32, "M": 16}[model]
    command = [
        program,
        "-m",
        str(path),
        "-c",
        str(slots * 1024),
        "-npp",
        str(prompt),
        "-ntg",
        str(answer),
        "-npl",
        str(slots),
    ]
    command += ["-t", str(THREADS), "-tb", str(THREADS), "-ngl", "0", "--output-format", "jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    prompts, answers = sum(len(job.prompt) for job in jobs), sum(job.max_tokens for job in jobs)
    wall = prompts / figures["speed_pp"] + answers / figures["speed_tg"]
    return {"wall_s": wall, "tokens_per_s": answers / wall}


def prefix_shared(path: Path, model: str) -> dict[str, Any]:
    """Rows with one 256-token prefix."""
    return ours_on(path, shared(ROWS[model], 256, 32, 48, same=True))


def prefix_own(path: Path, model: str) -> dict[str, Any]:
    """The same lengths with a prefix each."""
    return ours_on(path, shared(ROWS[model], 256, 32, 48, same=False))


def samples(path: Path, model: str) -> dict[str, Any]:
    """Eight samples of each of a few 256-token prompts."""
    return ours_on(path, shared(ROWS[model] // 16, 224, 32, 48, same=False), n=8, temperature=0.8)


def samples_as_rows(path: Path, model: str) -> dict[str, Any]:
    """As many answers to prompts that share nothing."""
    return ours_on(path, shared(ROWS[model] // 16 * 8, 224, 32, 48, same=False), temperature=0.8)


def reproducible(path: Path, model: str) -> dict[str, Any]:
    """Count the rows that change with batch size and order, greedy and seeded, in reproducible mode."""
    from llmpipe import LlamaCppRunner, Request, SamplingConfig
    from llmpipe.config import LlamaCppConfig

    if model == "S":  # in F16 nothing is promised
        path = write_gguf(path.with_name("S-Q8_0.gguf"), SHAPES["S-Q8_0"])
    jobs = [Job(job.prompt, min(job.max_tokens, 24)) for job in skewed(100)]
    changed = {}
    for temperature in (0.0, 0.8):
        answers: dict[str, dict[int, str | None]] = {}
        for label, slots, order in (("1", 1, 1), ("4", 4, 1), ("16", 16, 1), ("16 reversed", 16, -1)):
            config = LlamaCppConfig(model=str(path), slots=slots, reproducible=True, threads=THREADS)
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
        alone = answers["1"]
        changed[str(temperature)] = {
            label: sum(found[i] != alone[i] for i in alone) for label, found in answers.items() if label != "1"
        }
    return {"rows": len(jobs), "changed": changed}


CONTESTANTS: dict[str, Callable[[Path, str], dict[str, Any]]] = {
    "llmpipe": ours,
    "loop, threads matched": loop_matched,
    "loop, defaults": loop,
    "llama-server": server,
    "ceiling": ceiling,
    "shared prefix": prefix_shared,
    "own prefixes": prefix_own,
    "8 samples": samples,
    "8 rows": samples_as_rows,
    "reproducible": reproducible,
}
ONCE = ("reproducible",)


# --- the table --------------------------------------------------------------------------------------------------------

RATIOS = [
    ("`Llama.create_completion` loop, threads matched", "llmpipe", "loop, threads matched"),
    ("the same with its defaults", "llmpipe", "loop, defaults"),
    (f"`llama-server -np {SERVER_SLOTS}`, async client", "llmpipe", "llama-server"),
    ("`llama-batched-bench` ceiling", "llmpipe", "ceiling"),
    ("shared 256-token prefix against none shared", "shared prefix", "own prefixes"),
    ("8 samples of a 256-token prompt against 8 rows", "8 samples", "8 rows"),
]


def table(results: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """Return the figures as a Markdown table: medians over rounds of ratios within a round."""
    lines = ["| generated tokens/s, ratio against | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    for label, mine, other in RATIOS:
        cells = [ratio(found[mine], found[other]) for found in results.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    outside = [median(found["llmpipe"], "outside_decode", "{:.1%}") for found in results.values()]
    lines.append("| time outside `llama_decode` | " + " | ".join(outside) + " |")
    speed = [median(found["llmpipe"], "tokens_per_s", "{:,.0f}") for found in results.values()]
    lines.append("| llmpipe, generated tokens/s on this machine | " + " | ".join(speed) + " |")
    changes = [str(found["reproducible"][0].get("changed", "failed")) for found in results.values()]
    lines.append("| rows changed in reproducible mode | " + " | ".join(changes) + " |")
    return "\n".join(lines)


def ratio(mine: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    """Return the median over rounds of the ratio of generated tokens per second."""
    pairs = [
        m["tokens_per_s"] / o["tokens_per_s"]
        for m, o in zip(mine, other, strict=True)
        if "tokens_per_s" in m and "tokens_per_s" in o
    ]
    return f"{statistics.median(pairs):.2f} ×" if pairs else "not measured"


def median(runs: list[dict[str, Any]], key: str, pattern: str) -> str:
    """Return the median of one figure."""
    values = [run[key] for run in runs if key in run]
    return pattern.format(statistics.median(values)) if values else "not measured"


def find_program(name: str) -> str | None:
    """Return where a program of llama.cpp is."""
    return shutil.which(name, path=os.environ.get("LLAMA_BIN", "") + os.pathsep + os.environ.get("PATH", ""))


def peak_rss_mb() -> float:
    """Return this process's peak resident memory in MB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def machine() -> dict[str, Any]:
    """Say what this was measured on."""
    import llama_cpp

    return {
        "cores": THREADS,
        "processor": platform.processor() or platform.machine(),
        "llama_cpp_python": llama_cpp.__version__,
    }


if __name__ == "__main__":
    main()

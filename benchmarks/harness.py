"""What the benchmark programs share: contestants in processes of their own, rounds, the table, the machine.

A program names its contestants and the lines of its table, and calls `main`. Every contestant runs in a fresh process,
one after another, round by round, so that what a noisy machine does to one it does to its neighbours; ratios are taken
within a round, and a cell is their median with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from workload import Job

THREADS = psutil.cpu_count(logical=False) or 1
LIMIT_S = 3600
"""Longest that one contestant may take."""
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve")
"""Instruction sets that decide the speed of a matrix product."""
PACKAGES = ("llmpipe", "llama-cpp-python", "torch", "transformers")

Figures = dict[str, Any]
"""What a contestant measured; or why not, under `failed` or `skipped`."""
Results = dict[str, dict[str, list[Figures]]]
"""Model → contestant → figures, one per round."""


class Skipped(Exception):
    """A contestant cannot take part here, and that is nobody's fault."""


@dataclass(frozen=True)
class Setting:
    """What a contestant is told."""

    model: str
    """A name in `models.SHAPES`."""
    work: Path
    """Where the models are."""
    rows: int | None
    """Rows asked for on the command line, instead of the program's own number."""
    device: str


@dataclass(frozen=True)
class Contestant:
    """One way to do the work."""

    run: Callable[[Setting], Figures]
    once: bool = False
    """Whether one round is enough."""
    only_on: str | None = None
    """The device without which it has nothing to measure."""


@dataclass(frozen=True)
class Line:
    """One line of the table: a figure of a contestant, or its ratio to the same figure of another in the same round."""

    label: str
    contestant: str
    against: str | None = None
    figure: str = "tokens_per_s"
    pattern: str = "{:.2f} ×"
    only_on: str | None = None
    """The device without which there is no such figure."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark program."""

    description: str
    prepare: Callable[[Setting], None]
    """Makes the models that are not there yet."""
    contestants: dict[str, Contestant]
    lines: Sequence[Line]
    models: str
    devices: Sequence[str] = ("cpu",)


def main(benchmark: Benchmark) -> int:
    """Run the contestants, print the table, and return the exit code: 1 where one of them failed."""
    arguments = _parse(benchmark)
    if arguments.one:
        print(json.dumps(_run_here(benchmark, arguments)))
        return 0
    here = machine()
    print(here, file=sys.stderr)
    arguments.work.mkdir(parents=True, exist_ok=True)
    names = [n for n in arguments.contestants if benchmark.contestants[n].only_on in (None, arguments.device)]
    results: Results = {model: {name: [] for name in names} for model in arguments.models}
    for model in arguments.models:
        if "failed" in (made := _in_process("prepare", model)):
            sys.exit(f"cannot make model {model}: {made['failed']}")
        for round_number in range(arguments.rounds):
            for name in names:
                if round_number and benchmark.contestants[name].once:
                    continue
                figures = _in_process(name, model)
                results[model][name].append(figures)
                print(f"{model} round {round_number + 1} {name}: {figures}", file=sys.stderr, flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": here, "results": results}, indent=2) + "\n")
    print(table([line for line in benchmark.lines if line.only_on in (None, arguments.device)], results))
    runs = [figures for found in results.values() for rounds in found.values() for figures in rounds]
    return int(any("failed" in figures for figures in runs))


def _parse(benchmark: Benchmark) -> argparse.Namespace:
    program = Path(sys.argv[0])
    out = program.parent / "results" / program.with_suffix(".json").name.removeprefix("bench_")
    parser = argparse.ArgumentParser(
        description=benchmark.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=_names, default=benchmark.models, help="default: %(default)s")
    parser.add_argument("--contestants", type=_names, default=list(benchmark.contestants), help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--rows", type=int, help="by default as many as suit the model")
    parser.add_argument("--device", choices=benchmark.devices, default=benchmark.devices[0])
    parser.add_argument("--work", type=Path, default=Path("/tmp/llmpipe-benchmarks"), help="where models are made")
    parser.add_argument("--out", type=Path, default=out, help="default: %(default)s")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in arguments.contestants:
        if name not in benchmark.contestants:
            parser.error(f"no contestant {name!r}; there are {', '.join(benchmark.contestants)}")
    return arguments


def _names(text: str) -> list[str]:
    return text.split(",")


# --- one contestant ---------------------------------------------------------------------------------------------------


def _in_process(name: str, model: str) -> Figures:
    """Run one contestant, or `prepare`, in a process of its own: this program again, told so."""
    command = [sys.executable, *sys.argv, "--models", model, "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {LIMIT_S} s"}
    figures: Figures
    if done.returncode < 0:
        figures = {"failed": f"killed by {signal.Signals(-done.returncode).name}"}
    elif done.returncode:
        figures = {"failed": f"exit code {done.returncode}"}
    else:
        figures = json.loads(done.stdout.splitlines()[-1])
    if "failed" in figures:
        print(done.stderr, file=sys.stderr)
    return figures


def _run_here(benchmark: Benchmark, arguments: argparse.Namespace) -> Figures:
    setting = Setting(arguments.models[0], arguments.work, arguments.rows, arguments.device)
    try:
        if arguments.one == "prepare":
            benchmark.prepare(setting)
            return {}
        return benchmark.contestants[arguments.one].run(setting)
    except Skipped as reason:
        return {"skipped": str(reason)}
    except Exception as error:  # whatever befalls one contestant, the others may fare better
        traceback.print_exc()
        return {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:200]}


def run_llmpipe(runner: Any, jobs: Sequence[Job], n: int = 1, temperature: float = 0.0) -> Figures:
    """Run jobs through one of llmpipe's runners, as the pipeline does; every answer has its full length.

    Raises:
        RuntimeError: a row failed, so that the speed means nothing.
    """
    from llmpipe import Request, SamplingConfig

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
    if errors := [completion.error for completion in done if completion.error]:
        raise RuntimeError(f"{len(errors)} of {len(done)} rows failed, one with: {errors[0]}")
    figures = speed(wall, sum(completion.completion_tokens or 0 for completion in done))
    return figures | {
        "most_rows_in_flight": runner.info()["most_rows_in_flight"],
        "cached": sum(completion.cached_prompt_tokens or 0 for completion in done),
    }


def speed(wall_s: float, tokens: int) -> Figures:
    """Return the figures that every contestant has."""
    return {"wall_s": wall_s, "tokens": tokens, "tokens_per_s": tokens / wall_s, "peak_rss_mb": peak_rss_mb()}


def peak_rss_mb(process: int | str = "self") -> float:
    """Return a process's peak resident memory in MB.

    From /proc where there is one: `ru_maxrss` begins with what the process that started this one held.
    """
    status = Path(f"/proc/{process}/status")
    if status.is_file():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 / 1e6
    if process != "self":
        return psutil.Process(int(process)).memory_info().rss / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


# --- the table --------------------------------------------------------------------------------------------------------


def table(lines: Sequence[Line], results: Results) -> str:
    """Return the figures as a Markdown table: the median over rounds, in brackets the lowest and the highest."""
    rows = [["median (lowest–highest) over rounds", *results], ["---"] * (len(results) + 1)]
    for line in lines:
        cells = [cell(line, found) for found in results.values()]
        if any(cells):
            rows.append([line.label, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cell(line: Line, found: dict[str, list[Figures]]) -> str:
    """Return one cell: figures, and what went wrong where something did; nothing where nothing was run."""
    names = [line.contestant] if line.against is None else [line.contestant, line.against]
    rounds = list(zip(*(found.get(name, []) for name in names), strict=False))
    values = []
    for figures in rounds:
        numbers = [each[line.figure] for each in figures if line.figure in each]
        if len(numbers) == len(names):
            values.append(numbers[0] / numbers[1] if line.against else numbers[0])
    said = [spread(values, line.pattern)] if values else []
    for verdict in ("failed", "skipped"):
        reasons = [each[verdict] for figures in rounds for each in figures if verdict in each]
        said += [f"{verdict}: {reason}".replace("|", "\\|") for reason in dict.fromkeys(reasons)]
    return "; ".join(said)


def spread(values: Sequence[float], pattern: str) -> str:
    """Return the median and, of several values, the lowest and the highest in brackets."""
    median = pattern.format(statistics.median(values))
    if len(values) == 1:
        return median
    number = pattern[: pattern.index("}") + 1]  # without the unit
    lowest, highest = number.format(min(values)), number.format(max(values))
    return f"{median} ({lowest}–{highest})"


def machine() -> dict[str, Any]:
    """Say what this is measured on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "physical_cores": THREADS,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_before": os.getloadavg()[0],
        "gpu": _gpu(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _gpu() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

"""The pipeline around the model: rows per second and memory of a million rows that need no model.

    python benchmarks/bench_scale.py                       # ten thousand rows, then a million; on one core
    python benchmarks/bench_scale.py --rows 10000,100000

JSONL in, `backend=echo`, Parquet out, with ledger, metrics and durable commits, as the command line runs it, timed from
start to end. Each size runs in a process of its own, bound to one core; its memory is the most that the process ever
had resident, as the system counts it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ANSWER_TOKENS = 8


def main() -> None:
    """Run every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="10000,1000000", help="comma-separated")
    counts = [int(count) for count in parser.parse_args().rows.split(",")]
    print("| rows | rows/s, whole process | rows/s, reading to last commit | peak MB |\n|---|---|---|---|")
    for count in counts:
        with tempfile.TemporaryDirectory() as work:
            print(line(count, Path(work)), flush=True)


def line(count: int, work: Path) -> str:
    """Run `count` rows and return a line of the table."""
    dataset, out = work / "rows.jsonl", work / "out"
    with dataset.open("w", encoding="utf-8") as file:
        for i in range(count):
            prompt = f"Row {i}: which answer is due, and why is it due?"
            file.write(json.dumps({"id": f"r{i}", "prompt": prompt, "topic": i % 7, "reference": "Row"}) + "\n")
    command = [sys.executable, "-m", "llmpipe", "backend=echo", f"dataset.path={dataset}", "output=parquet"]
    command += [f"sampling.max_tokens={ANSWER_TOKENS}", f"hydra.run.dir={out}"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=one_core)
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - started
    assert status == 0, status
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["rows_ok"] == count, metrics
    peak_mb = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    return f"| {count:,} | {count / wall_s:,.0f} | {count / metrics['wall_s']:,.0f} | {peak_mb:.0f} |"


def one_core() -> None:
    """Bind this process to one core, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


if __name__ == "__main__":
    main()

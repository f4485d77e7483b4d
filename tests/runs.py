"""What a run of the echo backend has left, and runs in processes of their own."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMINGS = ("queue_s", "first_token_s", "latency_s")


def rows_of(directory: Path, timings: bool = False) -> list[dict[str, Any]]:
    """Return the output rows, by default without what differs from run to run."""
    lines = (directory / "outputs.jsonl").read_bytes().split(b"\n")[:-1]
    rows = [json.loads(line) for line in lines]
    return rows if timings else [{name: v for name, v in row.items() if name not in TIMINGS} for row in rows]


def errors_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "errors.jsonl").read_bytes().split(b"\n")[:-1]]


def bytes_of(directory: Path) -> dict[str, bytes]:
    names = ("outputs.jsonl", "outputs.parquet", "errors.jsonl", "metrics.json", "report.html")
    return {name: (directory / name).read_bytes() for name in names if (directory / name).exists()}


def start(dataset: Path, directory: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llmpipe", "backend=echo", f"dataset.path={dataset}", *overrides]
    return start_command(["nice", *command, f"hydra.run.dir={directory}"])  # who kills it must not be late


def start_command(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def committed(directory: Path) -> int:
    """Return how many completions a running process has made durable."""
    try:
        with sqlite3.connect(f"file:{directory / 'ledger.sqlite'}?mode=ro", uri=True) as ledger:
            return int(ledger.execute("SELECT count(*) FROM completions").fetchone()[0])
    except sqlite3.OperationalError:  # not there yet
        return 0

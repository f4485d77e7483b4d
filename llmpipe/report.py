"""Metrics → what a person sees in the terminal: a progress bar, a table for a run, a table for a sweep.

Shows figures and paths only; no generated text reaches the terminal from here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


class ProgressBar:
    """Rows done, rate and time left, on the standard error stream; silent where that is no terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("loading", total=None, rate="")

    def update(self, done: int, expected: int, tokens: int) -> None:
        """Show how far the run is; `tokens` counts what was generated since it started."""
        elapsed = self._progress.tasks[self._task].elapsed or 0.0
        rate = f"{tokens / elapsed:,.0f} tokens/s" if elapsed else ""
        self._progress.update(self._task, description="rows", completed=done, total=expected, rate=rate)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()


def show_summary(metrics: dict[str, Any], directory: Path) -> None:
    """Print the figures of one run and where its files are."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _figures(metrics):
        table.add_row(name, value)
    console = _console()
    console.print(table)
    console.print()
    for name in (metrics["output"], "metrics.json", "errors.jsonl"):
        if name != "errors.jsonl" or metrics["rows_error"]:
            console.print(str(_short(directory / name)), markup=False, highlight=False)


def show_comparison(jobs: Sequence[tuple[list[str], dict[str, Any]]]) -> None:
    """Print the runs of a sweep, a line each, named by the overrides in which they differ."""
    shared = set.intersection(*(set(overrides) for overrides, _ in jobs))
    scores = list(dict.fromkeys(name for _, metrics in jobs for name in metrics["scores"]))
    table = Table(title="sweep")
    for column in ("job", "rows", "errors", *scores, "tokens/s", "p50 s", "p99 s", "peak MB"):
        table.add_column(column, justify="left" if column == "job" else "right")
    for overrides, m in jobs:
        table.add_row(
            " ".join(override for override in overrides if override not in shared),
            str(m["rows"]),
            str(m["rows_error"]),
            *(_number(m["scores"].get(score), "{:.1%}") for score in scores),
            _number(m["completion_tokens_per_s"], "{:,.0f}"),
            _number(m["latency_s"]["p50"], "{:.3f}"),
            _number(m["latency_s"]["p99"], "{:.3f}"),
            _number(m["peak_rss_mb"], "{:,.0f}"),
        )
    _console().print(table)


def _figures(m: dict[str, Any]) -> list[tuple[str, str]]:
    runner = m["runner"]
    latency, first = m["latency_s"], m["first_token_s"]
    memory = f"{_number(m['peak_rss_mb'], '{:,.0f}')} MB resident"
    if m["peak_device_mb"]:
        memory += f", {m['peak_device_mb']:,.0f} MB on the device"
    figures = [
        (
            "model",
            f"{runner.get('model')}: {runner.get('model_type', 'unknown type')} on {runner.get('device')}",
        ),
        ("prompts", m["prompt_format"] or "unknown"),
        ("rows", f"{m['rows']} ({m['rows_ok']} ok, {m['rows_error']} errors)"),
        ("tokens", f"{m['prompt_tokens']:,} prompt, {m['completion_tokens']:,} generated"),
        (
            "speed",
            f"{_number(m['prompt_tokens_per_s'], '{:,.0f}')} prompt tokens/s, "
            f"{_number(m['completion_tokens_per_s'], '{:,.0f}')} generated tokens/s",
        ),
        ("time", f"{_number(m['load_s'], '{:.2f}')} s loading, {m['wall_s']:.2f} s generating"),
        (
            "latency",
            ", ".join(f"{name} {_number(latency[name], '{:.3f}')} s" for name in ("p50", "p90", "p99")),
        ),
        (
            "first token",
            ", ".join(f"{name} {_number(first[name], '{:.3f}')} s" for name in ("p50", "p90", "p99")),
        ),
        ("peak memory", memory),
    ]
    return figures + [
        (name.replace("_", " "), f"{score:.1%} of {m['scored_rows'][name]}") for name, score in m["scores"].items()
    ]


def _number(value: float | None, pattern: str) -> str:
    return "-" if value is None else pattern.format(value)


def _console() -> Console:
    # Of fixed width where nobody watches, so that logs and pipes get whole lines.
    return Console(width=None if sys.stdout.isatty() else 120)


def _short(path: Path) -> Path:
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path

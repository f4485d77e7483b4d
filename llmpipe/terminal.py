"""Metrics → what a person sees in the terminal: a progress bar, a table for a run, for a plan, for a sweep.

No generated text reaches the terminal from here; of a plan's prompts, what a terminal would obey is spelt out.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Self, TextIO

import rich.progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmpipe.figures import shown_figures
from llmpipe.progress import Progress
from llmpipe.system.workers import is_worker
from llmpipe.text import harmless
from llmpipe.units import percent, words

BAR_WIDTH = 40
REASONS = 5
"""Why rows failed: how many reasons are shown."""
SHOWN_EVERY_S = 0.25
LOGGED_EVERY_S = 60.0

log = logging.getLogger(__name__)


class ProgressBar:
    """Answers so far, rate and time left, on the standard error stream; where nobody watches, a line a minute in a log.

    Log lines, and what else is written to the stream meanwhile, appear above the bar.
    """

    def __init__(self) -> None:
        # A worker shares its terminal with others, whose bars would overwrite each other.
        watched = sys.stderr.isatty() and not is_worker()
        self._console = Console(file=sys.stderr)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.TextColumn("{task.fields[figures]}"),
            console=self._console,
            expand=True,
            disable=not watched or self._console.is_dumb_terminal,
        )
        self._id = self._bar.add_task("loading", total=None, figures="")
        self._done = -1
        self._shown_at, self._logged_at = 0.0, math.inf

    def update(self, progress: Progress) -> None:
        """Show how far the run is, where that is due."""
        now = time.monotonic()
        if now - self._shown_at < SHOWN_EVERY_S and (self._done == progress.done or progress.done < progress.expected):
            return
        self._shown_at, self._done = now, progress.done
        self._logged_at = min(self._logged_at, now)
        outlook = progress.outlook()
        figures = [f"{progress.done:,}/{progress.expected:,}", f"{outlook.tokens_per_s:,.0f} tokens/s"]
        if outlook.left_s is not None and progress.done < progress.expected:
            figures.append(f"{timedelta(seconds=round(outlook.left_s))} left")
        said = "  ".join(figures)
        self._bar.update(
            self._id, description="answers", completed=outlook.answers, total=progress.expected, figures=said
        )
        if self._bar.disable and now - self._logged_at >= LOGGED_EVERY_S:
            self._logged_at = now
            log.info("%s", ", ".join(figures))

    def __enter__(self) -> Self:
        global _above
        self._bar.start()
        _above = None if self._bar.disable else self._console
        return self

    def __exit__(self, *exc: object) -> None:
        global _above
        _above = None
        self._bar.stop()


_above: Console | None = None
"""Prints above the bar, where one is shown."""


class TerminalHandler(logging.StreamHandler[TextIO]):
    """Writes the log to the standard error stream: above the progress bar, where one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        console = _above
        if console is None:
            super().emit(record)
            return
        try:
            console.print(Text(self.format(record)), soft_wrap=True)
        except Exception:  # as every handler does: what cannot be said ends nothing
            self.handleError(record)


def show_summary(metrics: dict[str, Any], directory: Path) -> None:
    """Print the figures of one run and where its files are."""
    console = _console()
    console.print(_table(_figures(metrics)))
    _say_reasons(console, metrics)
    console.print()
    for name in (metrics["output"], "metrics.json", "report.html", "errors.jsonl"):
        if name != "errors.jsonl" or metrics["rows_error"]:
            console.print(str(_short(directory / name)), markup=False, highlight=False)


def show_plan(found: dict[str, Any], directory: Path) -> None:
    """Print what a run would do and take."""
    console = _console()
    console.print(_table(_plan_figures(found)))
    _say_reasons(console, found)
    if found["prompt_tokens_histogram"]:
        _say(console, "\nprompt tokens")
        most = max(one["rows"] for one in found["prompt_tokens_histogram"])
        for one in found["prompt_tokens_histogram"]:
            bar = "█" * -(-one["rows"] * BAR_WIDTH // most)
            _say(console, f"  {one['from']:>9,} to {one['to']:<9,} {one['rows']:>9,} {bar}".rstrip())
        _say(console, "\nlongest rows")
        for row in found["longest"]:
            tokens = f"{row['prompt_tokens']:,} prompt tokens, up to {row['max_tokens']:,} generated"
            _say(console, f"  {row['file']} line {row['line']} ({row['id']}): {tokens}")
    for row in found["prompts"]:
        cut = f" (the first {len(row['text']):,} of {row['characters']:,} characters)"
        _say(console, f"\nprompt of {row['id']}{cut if row['characters'] > len(row['text']) else ''}")
        _say(console, row["text"])
    if found["rows_done"] is None:
        _say(console, f"\n{_short(directory / 'plan.json')}")


def show_export(path: Path, rows: int, of: int) -> None:
    """Say how much of a run was written, and where."""
    _say(_console(), f"{rows:,} of {of:,} rows\n{_short(path)}")


def show_comparison(jobs: Sequence[tuple[list[str], dict[str, Any] | None]]) -> None:
    """Print the runs of a sweep, a line each, named by the overrides in which they differ; some may have no metrics."""
    shared = set.intersection(*(set(overrides) for overrides, _ in jobs))
    scores = list(dict.fromkeys(name for _, metrics in jobs if metrics for name in metrics["scores"]))
    table = Table(title="sweep")
    for column in ("job", "rows", "errors", *scores, "tokens/s", "p50 s", "p99 s", "peak MB"):
        table.add_column(column, justify="left" if column == "job" else "right")
    for overrides, m in jobs:
        name = " ".join(override for override in overrides if override not in shared)
        if m is None:
            table.add_row(Text(name), "not finished")
            continue
        table.add_row(
            Text(name),
            str(m["rows"]),
            str(m["rows_error"]),
            *(_number(m["scores"].get(score), "{:.1%}") for score in scores),
            _number(m["completion_tokens_per_s"], "{:,.0f}"),
            _number(m["latency_s"]["p50"], "{:.3f}"),
            _number(m["latency_s"]["p99"], "{:.3f}"),
            _number(m["peak_rss_mb"], "{:,.0f}"),
        )
    _console().print(table)


def _plan_figures(p: dict[str, Any]) -> list[tuple[str, str]]:
    model, tokens, sizes, memory = p["model"], p["prompt_tokens"], p["sizes"], p["memory_mb"]
    place = f": {model['model_type']} on {model['device']}, not loaded" if sizes else ""
    figures = [("model", f"{model['model']}{place}"), ("prompts", p["prompt_format"])]
    figures.append(("rows", f"{p['rows']:,} ({p['rows_ok']:,} ok, {p['rows_error']:,} errors)"))
    if p["rows_done"] is not None:
        figures.append(("done", f"{p['rows_done']:,} of them, in the run that is there"))
    figures.append(("ids", f"unique, {p['rows_without_id']:,} by position"))
    if not p["rows_ok"]:
        figures.append(("prompt tokens", "none: there is no row that can be run"))
    elif tokens is None:
        figures.append(("prompt tokens", "unknown without the weights"))
    else:
        shares = ", ".join(f"{name} {tokens[name]:,.0f}" for name in ("p50", "p90", "p99", "max"))
        sampled = f", in {p['counted_rows']:,} rows: 1 of {p['counted_every']}" if p["counted_every"] > 1 else ""
        figures.append(("prompt tokens", f"{tokens['total']:,}{sampled}; {shares}"))
    if "context" in model:
        over = "" if p["rows_over_context"] is None else f", {p['rows_over_context']:,} rows over it"
        figures.append(("context", f"{model['context']:,} tokens{over}"))
    if sizes:
        slots = f"{sizes['slots']} of {sizes['slot_tokens']:,} tokens, {sizes['prefix_slots']} for shared prefixes"
        figures += [("slots", slots), *(("", reason) for reason in sizes["reasons"])]
        needed = [f"{_number(memory[name], '{:,.0f}')} MB {name}" for name in ("weights", "cache", "total")]
        figures.append(("memory", f"about {needed[0]} and {needed[1]}: {needed[2]}"))
    return figures


def _say_reasons(console: Console, found: dict[str, Any]) -> None:
    """Say why rows are errors, the most frequent reasons first, each with one row."""
    reasons = found["error_reasons"][:REASONS]
    for one in reasons:
        rows = f"{'' if one['exact'] else 'at least '}{one['rows']:,} row{'s' if one['rows'] > 1 else ''}"
        said = harmless(f"  {rows}, such as {one['file']} line {one['line']}: {one['reason']}")
        _say(console, said.replace("\n", "\\n"))  # a line each, whatever a reason quotes
    if (more := found["rows_error"] - sum(one["rows"] for one in reasons)) > 0:
        _say(console, f"  and {more:,} more")


def _table(figures: Sequence[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in figures:
        table.add_row(name, Text(value))
    return table


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _figures(m: dict[str, Any]) -> list[tuple[str, str]]:
    runner, lines = m["runner"], defaultdict[str, list[str]](list)
    for figure in shown_figures(m):
        lines[figure.line].append(figure.said)
    return [
        ("model", f"{runner.get('model')}: {_kind(runner)} on {runner.get('device')}"),
        ("prompts", m["prompt_format"] or "unknown"),
        *((line, ", ".join(said)) for line, said in lines.items() if line),
        *((words(name), f"{percent(score)} of {m['scored_samples'][name]:,}") for name, score in m["scores"].items()),
        *(("" if number else "sizes", reason) for number, reason in enumerate(runner.get("sizes") or ())),
    ]


def _kind(runner: dict[str, Any]) -> str:
    """Return a model's type and size, which some types name."""
    kind, size = runner.get("model_type", "unknown type"), f"{(runner.get('parameters') or 0) / 1e6:.1f}M"
    return kind if size in (*kind.split(), "0.0M") else f"{kind} {size}"


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


class TerminalFormatter(logging.Formatter):
    """Formats the log for a terminal, which must not obey what a model or a dataset says."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's text."""
        return harmless(super().format(record))

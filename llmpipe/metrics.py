"""Completions → totals and percentiles. To add a figure: a line in `Totals.summary`, and its entry in `FIGURES`."""

from __future__ import annotations

import platform
from array import array
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from llmpipe.records import Completion
from llmpipe.system import machine
from llmpipe.version import __version__

TIMES = ("queue_s", "first_token_s", "latency_s")
_times_of = attrgetter(*TIMES)


class Totals:
    """Sums and distributions over the completions of a run; a few numbers per row, whatever the texts' lengths."""

    def __init__(self) -> None:
        self._rows = {True: 0, False: 0}
        self._row: tuple[int, bool] | None = None
        self._completions = 0
        self._prompt_tokens = 0
        self._cached_prompt_tokens = 0
        self._truncated = 0
        self.times = {name: array("d") for name in TIMES}
        """Seconds, of each answer."""
        self.answer_tokens = array("I")
        """Completion tokens of each answer whose runner counts them."""
        self._scores: dict[str, list[float]] = {}
        self._finish_reasons: dict[str, int] = {}

    def add(self, completion: Completion) -> None:
        """Count one completion; those of one row must come one after another."""
        ok = completion.error is None
        if self._row is not None and self._row[0] == completion.request_id:
            self._row = (completion.request_id, self._row[1] and ok)
        else:
            self._end_row()
            self._row = (completion.request_id, ok)
        reason = completion.finish_reason or "error"
        self._finish_reasons[reason] = self._finish_reasons.get(reason, 0) + 1
        for name, score in completion.scores.items():
            total = self._scores.setdefault(name, [0.0, 0])
            total[0] += score
            total[1] += 1
        if not ok:
            return
        self._completions += 1
        self._prompt_tokens += completion.prompt_tokens or 0
        self._cached_prompt_tokens += completion.cached_prompt_tokens or 0
        self._truncated += bool(completion.truncated_prompt_tokens)
        if completion.completion_tokens is not None:
            self.answer_tokens.append(completion.completion_tokens)
        for times, value in zip(self.times.values(), _times_of(completion), strict=True):
            if value is not None:
                times.append(value)

    def _end_row(self) -> None:
        if self._row is not None:
            self._rows[self._row[1]] += 1
            self._row = None

    def _service_s(self) -> Sequence[float]:
        """Return the seconds from each answer's admission to its end; none where the runner does not tell of one."""
        latency, queue = self.times["latency_s"], self.times["queue_s"]
        return np.subtract(latency, queue) if len(latency) == len(queue) else ()  # type: ignore[return-value]

    def summary(self, wall_s: float) -> dict[str, Any]:
        """Return the figures of `metrics.json` that follow from the completions.

        Args:
            wall_s: Seconds spent generating, loading not counted; rates are per second of it.
        """
        self._end_row()
        completion_tokens = sum(self.answer_tokens)

        def per_s(count: int) -> float | None:
            return count / wall_s if wall_s > 0 else None

        return {
            "rows": sum(self._rows.values()),
            "rows_ok": self._rows[True],
            "rows_error": self._rows[False],
            "completions": self._completions,
            "finish_reasons": self._finish_reasons,
            "prompt_tokens": self._prompt_tokens,
            "cached_prompt_tokens": self._cached_prompt_tokens,
            "completion_tokens": completion_tokens,
            "truncated_prompts": self._truncated,
            "wall_s": wall_s,
            "prompt_tokens_per_s": per_s(self._prompt_tokens),
            "completion_tokens_per_s": per_s(completion_tokens),
            "rows_per_s": per_s(sum(self._rows.values())),
            **{name: percentiles(times) for name, times in self.times.items()},
            "service_s": percentiles(self._service_s()),
            "scores": {name: total / count for name, (total, count) in self._scores.items()},
            "scored_samples": {name: int(count) for name, (_, count) in self._scores.items()},
        }


def engine_speeds(info: Mapping[str, Any]) -> dict[str, float | None]:
    """Return tokens per second of the engine's own time, from what a runner says of itself; nulls where it does not."""
    engine = info.get("engine") or {}

    def speed(what: str) -> float | None:
        tokens, seconds = engine.get(f"{what}_tokens"), engine.get(f"{what}_s")
        return tokens / seconds if tokens and seconds else None

    return {f"{what}_tokens_per_s": speed(what) for what in ("prefill", "decode")}


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """Return p50, p90, p99 (linear interpolation), mean and max; nulls where there are no values."""
    names = ("p50", "p90", "p99", "mean", "max")
    if not len(values):
        return dict.fromkeys(names)
    data = np.asarray(values, dtype=np.float64)
    figures = [*np.percentile(data, [50, 90, 99]), data.mean(), data.max()]
    return {name: float(figure) for name, figure in zip(names, figures, strict=True)}


def environment() -> dict[str, Any]:
    """Say what the run ran on: of cores and memory, what it may use."""
    return {
        "llmpipe": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": machine.cores().physical,
        "memory_mb": machine.memory_bytes() / 1e6,
    }

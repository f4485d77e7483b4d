"""What is kept of a run while its rows go by, and the page that is made of it and of the run's metrics."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmpipe.config import BACKENDS, ColumnsConfig
from llmpipe.histogram import TICKS, even_bars, log_bars
from llmpipe.records import Completion, Row
from llmpipe.report.excerpts import Answer, Failed, answer_of, failed_of, shown

TEMPLATE = Path(__file__).with_name("page.html.jinja")
STYLE = Path(__file__).with_name("page.css")
ERROR_ROWS = 20
ANSWERS = 10
PATHS = 3
"""Files of the dataset that the page's head names."""


class Report:
    """Keeps what the page shows of the rows, a bounded amount, and makes the page.

    Args:
        columns: What the dataset calls its columns.
        templated: Whether prompts are made by `prompt.template`, of whatever columns; whole rows are shown then.
    """

    def __init__(self, columns: ColumnsConfig, templated: bool = False) -> None:
        self._columns = columns
        self._templated = templated
        self._failed: list[Failed] = []
        self._failures = 0
        self._answers: list[Answer] = []
        self._wrong: list[Answer] = []

    def add(self, row: Row, completion: Completion) -> None:
        """Take one output row; they come in order. Those that scored 0 with every scorer are kept apart."""
        if completion.error is not None:
            self._failures += 1
            if len(self._failed) < ERROR_ROWS:
                self._failed.append(failed_of(row, completion, self._columns))
            return
        kept = self._wrong if completion.scores and not any(completion.scores.values()) else self._answers
        if len(kept) < ANSWERS:
            kept.append(answer_of(row, completion, self._columns, self._templated))

    def page(
        self, metrics: dict[str, Any], config: dict[str, Any], latency_s: Sequence[float], tokens: Sequence[int]
    ) -> bytes:
        """Return the page, in UTF-8.

        Args:
            metrics: The content of `metrics.json`.
            config: The run's configuration as plain values.
            latency_s: Of each answer, as far as it is known.
            tokens: Of each answer, as far as they are counted.
        """
        import jinja2
        from markupsafe import Markup

        def finalize(value: Any) -> Any:
            return value if isinstance(value, Markup) else shown(str(value))

        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=finalize
        )
        runner = metrics["runner"] or {}
        style = STYLE.read_text(encoding="utf-8")
        page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
            style=Markup(style),
            style_hash=base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii"),
            name=_short(runner.get("model") or "unknown model"),
            backend=_backend(config),
            dataset=_dataset(config),
            m=metrics,
            runner=runner,
            config=config,
            latency=log_bars(latency_s),
            tokens=even_bars(tokens),
            ticks=TICKS,
            failed=self._failed,
            failures=self._failures,
            answers=self._answers,
            most_answers=ANSWERS,
            wrong=self._wrong,
            **{function.__name__: function for function in (count, memory, number, percent, seconds, words)},
        )
        return page.encode("utf-8", "backslashreplace")


def _backend(config: Mapping[str, Any]) -> str:
    target = config["backend"].get("_target_")
    return next((name.value for name, known in BACKENDS.items() if known._target_ == target), str(target))


def _dataset(config: Mapping[str, Any]) -> str:
    path = config["dataset"]["path"]
    paths = [_short(one) for one in (path if isinstance(path, list) else [path])]
    more = f" and {len(paths) - PATHS} more" if len(paths) > PATHS else ""
    return ", ".join(paths[:PATHS]) + more


def _short(path: Any) -> str:
    """Return the last part of a path, or of a hub's id."""
    text = str(path).replace("\\", "/").rstrip("/")
    return text.rpartition("/")[2] or str(path)


# --- figures in words; a dash where there is none ---------------------------------------------------------------------


def count(value: float | None) -> str:
    """Return a number without its fraction."""
    return "–" if value is None else f"{value:,.0f}"


def number(value: float | None) -> str:
    """Return a number with three digits, or with all that stand before the point."""
    if value is None:
        return "–"
    decimals = 0 if value == int(value) else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def percent(value: float | None) -> str:
    """Return a share."""
    return "–" if value is None else f"{value:.1%}"


def memory(value_mb: float | None) -> str:
    """Return an amount of memory."""
    if value_mb is None:
        return "–"
    return f"{value_mb:,.0f} MB" if value_mb < 10_000 else f"{value_mb / 1000:,.1f} GB"


def seconds(value_s: float | None) -> str:
    """Return a time in the unit that suits it."""
    if value_s is None:
        return "–"
    if value_s < 60:
        unit, scale = ("s", 1) if value_s >= 1 or not value_s else ("ms", 1e3) if value_s >= 1e-3 else ("µs", 1e6)
        return f"{number(value_s * scale)} {unit}"
    minutes, rest = divmod(round(value_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def words(name: str) -> str:
    """Return the name of a figure as one reads it."""
    return name.replace("_", " ")

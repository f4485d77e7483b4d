"""What is kept of a run while its rows go by, and the page that is made of it and of the run's metrics."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmpipe.config import BACKENDS, ColumnsConfig
from llmpipe.figures import FIGURES, shown_figures
from llmpipe.histogram import TICKS, even_bars, log_bars
from llmpipe.records import Completion, Row
from llmpipe.report.excerpts import Answer, Failed, answer_of, failed_of, shown
from llmpipe.units import count, memory, number, percent, seconds, words

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
            figures=shown_figures(metrics),
            times=[one for one in FIGURES if one.distribution],
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

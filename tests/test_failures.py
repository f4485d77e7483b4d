"""Why rows failed is said by the most frequent reasons, in bounded memory."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

import llmpipe
from llmpipe.failures import SHAPES, Failures
from llmpipe.figures import FIGURES
from llmpipe.terminal import _console, _say_reasons

ROOT = Path(__file__).parent.parent


def test_reasons_that_differ_in_numbers_and_quotes_are_one_and_name_a_row() -> None:
    failures = Failures()
    for i in range(1000):
        failures.add(i, "a.jsonl", i + 1, f"{i} tokens of 'row {i}' exceed 512" if i % 10 else "no prompt")
    failures.add(999, "a.jsonl", 1000, "another sample of the same row")
    first, second = failures.most_frequent()
    where = {"file": "a.jsonl", "line": 2}
    assert first == {"rows": 900, "exact": True, "reason": "1 tokens of 'row 1' exceed 512", **where}
    assert (second["rows"], second["reason"]) == (100, "no prompt")


def test_a_frequent_reason_is_found_among_ever_new_ones_in_bounded_memory() -> None:
    failures = Failures()
    for i in range(20 * SHAPES):
        failures.add(i, "a", i, "".join(chr(97 + int(digit)) for digit in str(i)) if i % 3 else "the one")
    assert len(failures._found) <= SHAPES
    first = failures.most_frequent()[0]
    assert first["reason"] == "the one" and 0 < first["rows"] <= 20 * SHAPES // 3 + 1 and not first["exact"]


def test_a_reason_has_one_line_on_the_terminal_whatever_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    failures = Failures()
    failures.add(0, "a\x1b[2J.jsonl", 1, "\x1b[31mred\n  9 rows, such as [bold]none[/bold]")
    _say_reasons(_console(), {"error_reasons": failures.most_frequent(), "rows_error": 1})
    said = r"  1 row, such as a\x1b[2J.jsonl line 1: \x1b[31mred\n  9 rows, such as [bold]none[/bold]"
    assert capsys.readouterr().out == said + "\n"


def test_every_figure_is_defined_on_the_page_of_figures(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Callable[..., llmpipe.RunConfig]
) -> None:
    config = echo_config(write_jsonl({"prompt": "a", "reference": "a"}, b"{bad", b"{worse"))
    metrics = llmpipe.run(config, tmp_path / "run")
    assert sorted(metrics) == sorted(figure.key for figure in FIGURES)
    page = runpy.run_path(str(ROOT / "tools" / "generated_tables.py"))["on_page_markdown"](
        (ROOT / "docs" / "metrics.md").read_text()
    )
    assert [name for name in metrics if not re.search(rf"^\| `{name}` \| \S.* \|$", page, re.MULTILINE)] == []
    assert sum(one["rows"] for one in metrics["error_reasons"]) == metrics["rows_error"] == 2
    assert metrics["prefill_tokens_per_s"] is None

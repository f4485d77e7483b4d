"""The page on extending llmpipe: its code does what it says."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from traps import Said

import llmpipe
from llmpipe import LLMRunnerFactory, figures, terminal, units
from llmpipe.datasets import READERS
from llmpipe.metrics import Totals
from llmpipe.outputs import WRITERS
from llmpipe.scorers import SCORERS

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
CODE = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))


@pytest.fixture(autouse=True)
def tables_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (READERS, WRITERS, SCORERS, LLMRunnerFactory._registered):
        for name in ("upper", ".txt", "tsv", "same_number"):
            monkeypatch.setitem(table, name, None)
            monkeypatch.delitem(table, name)


def run_code(name: str, directory: Path) -> dict[str, Any]:
    (directory / name).write_text(CODE[name])
    return runpy.run_path(str(directory / name))


def test_the_backend_runs_a_dataset_and_refuses_what_it_does_not_honour(place: Path, said: Said) -> None:
    (place / "upper.py").write_text(CODE["upper.py"])
    (command,) = re.findall(r"^    llmpipe (backend=echo .*)$", PAGE, re.MULTILINE)
    rows = [{"prompt": "so loud"}, {"prompt": "x", "sampling": {"top_k": 3}}]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert said(*command.split(), "dataset.path=rows.jsonl", "hydra.run.dir=out")[0] == 3
    answered, refused = [json.loads(line) for line in (place / "out" / "outputs.jsonl").open()]
    assert answered["completion"] == "SO LOUD?"
    assert "UpperRunner cannot honour sampling.top_k=3" in refused["error"]


def test_the_backend_can_be_registered(tmp_path: Path) -> None:
    LLMRunnerFactory.register("upper", run_code("upper.py", tmp_path)["UpperRunner"])
    runner = LLMRunnerFactory.create_runner({"backend": "upper", "ending": "?", "max_tokens": 1})
    assert runner.generate_text("so loud") == "SO?"


def test_the_dataset_format_the_output_format_and_the_scorer_work_together(
    tmp_path: Path, echo_config: Callable[..., llmpipe.RunConfig]
) -> None:
    for name in ("lines.py", "tabs.py", "numbers_alike.py"):
        run_code(name, tmp_path)
    (tmp_path / "rows.txt").write_bytes(b"the answer is 42.0\n\xff\n")
    metrics = llmpipe.run(echo_config(tmp_path / "rows.txt", "output.format=tsv"), tmp_path / "read")
    assert (metrics["rows_ok"], metrics["rows_error"]) == (1, 1)
    header, answer, error = (tmp_path / "read" / "outputs.tsv").read_text().splitlines()
    assert header.startswith("id\tcompletion\t") and answer.startswith("row-0\tthe answer is 42.0\t")
    assert "not UTF-8" in error
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the answer is 42.0", "reference": 42}\n')
    scored = llmpipe.run(echo_config(tmp_path / "rows.jsonl", "metrics.scorers=[same_number]"), tmp_path / "scored")
    assert scored["scores"] == {"same_number": 1.0}


def test_the_metric_is_a_line_of_totals_and_one_entry_that_terminal_report_and_docs_show(
    tmp_path: Path,
    write_jsonl: Callable[..., Path],
    echo_config: Callable[..., llmpipe.RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (line,) = re.findall(r'^    ("tokens_per_answer": .*),$', PAGE, re.MULTILINE)
    (entry,) = re.findall(r"^    (Figure\(.*?^    \))", PAGE, re.DOTALL | re.MULTILINE)
    figure: figures.Figure = eval(entry, vars(figures) | vars(units))
    monkeypatch.setattr(figures, "FIGURES", (*figures.FIGURES, figure))
    summary = Totals.summary

    def with_metric(self: Totals, wall_s: float) -> dict[str, Any]:
        return summary(self, wall_s) | eval(f"{{{line}}}", {"self": self, "completion_tokens": sum(self.answer_tokens)})

    monkeypatch.setattr(Totals, "summary", with_metric)
    metrics = llmpipe.run(echo_config(write_jsonl({"prompt": "a b c"}, {"prompt": "d"})), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["tokens_per_answer"] == 2
    terminal.show_summary(metrics, tmp_path / "run")
    assert re.search(r"^tokens .* 4 generated, 2 per answer", capsys.readouterr().out, re.MULTILINE)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<dt>tokens per answer</dt><dd>2<small>of 2 answers</small>" in page


def test_a_format_that_does_not_exist_is_refused_before_anything_is_loaded(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Callable[..., llmpipe.RunConfig]
) -> None:
    with pytest.raises(
        llmpipe.LLMConfigError, match="output.format='tsv' is not allowed; it must be one of jsonl, parq"
    ):
        llmpipe.run(echo_config(write_jsonl({"prompt": "a"}), "output.format=tsv"), tmp_path / "run")

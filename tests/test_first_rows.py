"""What fails on every one of the first rows is refused before a model loads, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llmpipe
from llmpipe import DatasetError, LlamaCppRunner
from llmpipe.first_rows import FIRST_ROWS
from llmpipe.plan import plan

Compose = Callable[..., llmpipe.RunConfig]
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}{{ messages[0].content }}"
)


def refused(config: llmpipe.RunConfig, directory: Path) -> str:
    """Return why a run and a plan of it are refused."""
    said = []
    for start in (llmpipe.run, plan):
        with pytest.raises(DatasetError) as caught:
            start(config, directory)
        said.append(str(caught.value))
    assert said[0] == said[1] and not directory.exists()
    return said[0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"{bad", "not valid JSON at column 2"),
        (b"[1]", "a JSON list, not an object"),
        (b'{"prompt": "caf\xe9"}', "utf-8"),
        ({"prompt": 5}, "the prompt is a number, not text"),
        ({"prompt": None}, "no prompt"),
        ({"prompt": "x", "sampling": {"top_q": 1}}, "unknown sampling option"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "role 'alien'"),
    ],
)
@pytest.mark.parametrize("count", [1, 3, FIRST_ROWS + 50])
def test_rows_that_all_fail_are_refused_with_the_reason_and_the_first_line(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose, row: Any, reason: str, count: int
) -> None:
    lines = [b"", *[row] * count, *([{"prompt": "good"}] if count > FIRST_ROWS else [])]
    said = refused(echo_config(write_jsonl(*lines)), tmp_path / "run")
    assert "rows.jsonl line 2: " in said and reason in said
    assert (f"first {min(count, FIRST_ROWS)} rows" in said) == (count > 1)


def test_a_good_row_among_the_first_ones_or_one_that_only_says_nothing_is_enough(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose
) -> None:
    rows = [b"{bad"] * (FIRST_ROWS - 1)
    for number, good in enumerate(({"prompt": "x"}, {"prompt": ""}, {"messages": []}, {"prompt": "\ud800"})):
        metrics = llmpipe.run(echo_config(write_jsonl(*rows, good)), tmp_path / f"{number}")
        assert metrics["rows"] == FIRST_ROWS


@pytest.mark.parametrize("backend", ["llama_cpp", "transformers"])
def test_a_system_message_that_the_template_refuses_is_refused_before_weights_are_loaded(
    tmp_path: Path, write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    for runner in (LlamaCppRunner, llmpipe.TransformersRunner):
        monkeypatch.setattr(runner, "_initialize_model", lambda self: pytest.fail("a model was loaded"))
    (tmp_path / "template.jinja").write_text(NO_SYSTEM)
    options = [f"backend={backend}", f"backend.chat_template={tmp_path / 'template.jinja'}", "device=cpu"]
    path = write_jsonl({"prompt": "a"}, {"prompt": "b"})
    config = llmpipe.compose([*options, f"dataset.path={path}", "prompt.system=hi"])
    assert "rows.jsonl line 1: the chat template refuses these messages: no system here" in refused(
        config, tmp_path / "run"
    )


def test_one_question_costs_no_second_look_at_the_model(
    tmp_path: Path, write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaCppRunner, "_preview_model", lambda self: pytest.fail("the vocabulary was read"))
    path = write_jsonl({"prompt": "What is 2 + 2?"})
    llmpipe.run(llmpipe.compose([f"dataset.path={path}", "sampling.max_tokens=1"]), tmp_path / "run")

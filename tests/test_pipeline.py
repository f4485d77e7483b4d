"""Whole runs on the echo backend: every row comes out once, whatever it holds."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from runs import errors_of, rows_of, start

import llmpipe
from llmpipe import DatasetError, EchoRunner, LLMConfigError, LLMError
from llmpipe.exceptions import RunStopped
from llmpipe.ledger import saved

Compose = Callable[..., llmpipe.RunConfig]


# --- every row comes out ----------------------------------------------------------------------------------------------

GOOD = {"id": "good", "prompt": "one two", "note": [1, {"x": None}]}
BAD_ROWS = [
    (b"{bad", "not valid JSON"),
    (b"[]", "not an object"),
    (b"\xff", "utf-8"),
    ({"prompt": None}, "missing or null"),
    ({"prompt": ""}, "empty"),
    ({"prompt": 5}, "not text"),
    ({"messages": []}, "empty list"),
    ({"messages": [{"role": "alien", "content": "x"}]}, "role 'alien'"),
    ({"messages": [{"role": "user", "content": 1}]}, "not text"),
    ({"prompt": "x", "sampling": {"temperature": -1}}, "[0, 100]"),
    ({"prompt": "x", "sampling": {"stop": 5}}, "sampling"),
    ({"prompt": "x", "sampling": {"top_q": 1}}, "unknown sampling option 'top_q'"),
    ({"prompt": "\ud800"}, "lone surrogate"),
]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_bad_rows_are_error_rows_in_their_place_and_their_neighbours_are_answered(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose, format: str
) -> None:
    rows = [row for i, (bad, _) in enumerate(BAD_ROWS) for row in ({**GOOD, "id": f"g{i}"}, bad)]
    metrics = llmpipe.run(echo_config(write_jsonl(*rows), f"output={format}"), tmp_path / "run")
    count = len(BAD_ROWS)
    assert (metrics["rows"], metrics["rows_ok"], metrics["rows_error"]) == (2 * count, count, count)
    found = llmpipe.read_run(tmp_path / "run").rows
    assert found["id"].tolist() == [name for i in range(count) for name in (f"g{i}", f"row-{2 * i + 1}")]
    assert found["completion"].tolist()[::2] == ["one two"] * count
    assert found["completion"].isna().tolist()[1::2] == [True] * count
    assert set(found["finish_reason"].tolist()[1::2]) == {"error"}
    for error, (_, reason) in zip(found["error"].tolist()[1::2], BAD_ROWS, strict=True):
        assert reason in error
    errors = errors_of(tmp_path / "run")
    assert [(error["id"], error["line"]) for error in errors] == [(f"row-{2 * i + 1}", 2 * i + 2) for i in range(count)]
    assert [error["reason"] for error in errors] == found["error"].tolist()[1::2]
    assert errors[0]["raw"] == "{bad"


@pytest.mark.parametrize("source", ["jsonl", "jsonl.gz", "csv", "parquet"])
@pytest.mark.parametrize("target", ["jsonl", "parquet"])
def test_every_input_format_gives_the_same_answers_in_every_output_format(
    tmp_path: Path, echo_config: Compose, source: str, target: str
) -> None:
    frame = pd.DataFrame({"id": ["a", "b", "c"], "prompt": ["x y", None, "z"], "tag": ["1", "2", "é"]})
    path = tmp_path / f"rows.{source}"
    if source == "csv":
        frame.to_csv(path, index=False)
    elif source == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=True)
    llmpipe.run(echo_config(path, f"output={target}"), tmp_path / "run")
    rows, metrics = llmpipe.read_run(tmp_path / "run")
    assert rows[["id", "tag"]].values.tolist() == [["a", "1"], ["b", "2"], ["c", "é"]]
    assert rows["completion"].fillna("none").tolist() == ["x y", "none", "z"]
    assert rows["prompt_tokens"].fillna(-1).tolist() == [2, -1, 1]
    assert (metrics["rows_ok"], metrics["rows_error"]) == (2, 1)
    if target == "parquet":
        types = {field.name: str(field.type) for field in pq.read_schema(tmp_path / "run" / "outputs.parquet")}
        assert (types["prompt_tokens"], types["latency_s"], types["error"]) == ("int64", "double", "string")


def test_chats_in_parquet_are_answered(tmp_path: Path, echo_config: Compose) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    pq.write_table(pa.table({"messages": [chat, [], None]}), tmp_path / "a.parquet")
    llmpipe.run(echo_config(tmp_path / "a.parquet", "output=parquet"), tmp_path / "run")
    table = pq.read_table(tmp_path / "run" / "outputs.parquet")
    assert table["completion"].to_pylist() == ["hi", None, None]
    assert table["messages"].to_pylist() == [chat, [], None]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_an_empty_dataset_gives_an_empty_output_and_zero_counts(
    tmp_path: Path, echo_config: Compose, suffix: str, format: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"prompt\n" if suffix == "csv" else b"")
    if suffix == "parquet":
        pq.write_table(pa.table({"id": pa.array([], pa.int64()), "prompt": pa.array([], pa.string())}), path)
    metrics = llmpipe.run(echo_config(path, f"output={format}"), tmp_path / "run")
    assert (metrics["rows"], metrics["rows_ok"], metrics["rows_error"]) == (0, 0, 0)
    assert len(llmpipe.read_run(tmp_path / "run").rows) == 0
    assert (tmp_path / "run" / "errors.jsonl").read_bytes() == b""


def test_the_command_ends_with_0_1_or_3(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    empty = write_jsonl(name="empty.jsonl")
    some = write_jsonl({"prompt": "a"}, b"{bad", name="some.jsonl")
    refused = write_jsonl({"text": "a"}, name="refused.jsonl")
    ends = [start(path, tmp_path / path.stem) for path in (empty, some, refused)]
    said = [one.communicate(timeout=60)[1] for one in ends]
    assert [one.returncode for one in ends] == [0, 3, 1], said
    assert "refused.jsonl has neither a column 'prompt' nor 'messages'; it has: text" in said[2]
    assert not (tmp_path / "refused" / "outputs.jsonl").exists()


@pytest.mark.parametrize(
    ("rows", "overrides", "error"),
    [
        ([{"text": "a"}], [], DatasetError),
        ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}], [], DatasetError),
        ([{"prompt": "a", "completion": "b"}], [], DatasetError),
        ([{"prompt": "a"}], ["prompt.template='{topic}'"], DatasetError),
        ([{"prompt": "a"}], ["prompt.template='{'"], LLMConfigError),
        ([{"prompt": "a"}], ["metrics.scorers=[bleu]"], LLMConfigError),
    ],
)
def test_what_would_fail_every_row_is_refused_before_a_model_loads(
    tmp_path: Path,
    write_jsonl: Callable[..., Path],
    echo_config: Compose,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[Any],
    overrides: list[str],
    error: type[LLMError],
) -> None:
    monkeypatch.setattr(EchoRunner, "_initialize_model", lambda self: pytest.fail("a model was loaded"))
    with pytest.raises(error):
        llmpipe.run(echo_config(write_jsonl(*rows), *overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_format_whose_package_is_not_installed_is_refused_before_a_model_loads(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setattr(EchoRunner, "_initialize_model", lambda self: pytest.fail("a model was loaded"))
    with pytest.raises(LLMError, match=r"output=parquet needs .*: pip install 'llmpipe\[parquet\]'"):
        llmpipe.run(echo_config(write_jsonl({"prompt": "hi"}), "output=parquet"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_prefix_goes_before_every_added_column(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose
) -> None:
    path = write_jsonl({"prompt": "a", "completion": "mine", "error": 0, "id": "x", "reference": "a"})
    llmpipe.run(echo_config(path, "output.prefix=llm_"), tmp_path / "run")
    (row,) = rows_of(tmp_path / "run")
    assert (row["completion"], row["error"], row["id"]) == ("mine", 0, "x")
    assert (row["llm_completion"], row["llm_error"], row["llm_score_exact_match"]) == ("a", None, 1.0)


def test_a_conflict_that_only_shows_at_the_end_costs_no_answers(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose, asked: list[Any]
) -> None:
    path = write_jsonl({"prompt": "a", "sample": "mine", "sampling": {"n": 2}})
    with pytest.raises(DatasetError, match="'sample' that llmpipe would add: set output.prefix="):
        llmpipe.run(echo_config(path), tmp_path / "run")
    llmpipe.run(echo_config(path, "output.prefix=llm_"), tmp_path / "run")
    assert [(row["sample"], row["llm_sample"]) for row in rows_of(tmp_path / "run")] == [("mine", 0), ("mine", 1)]
    assert asked == [(0, (0, 1))]


def test_columns_template_limit_and_system_message_are_those_of_the_config(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose
) -> None:
    path = write_jsonl(*({"key": f"k{i}", "q": f"q{i}", "gold": f"Q: q{i}"} for i in range(3)))
    columns = ["dataset.columns.id=key", "dataset.columns.reference=gold", "dataset.limit=2"]
    metrics = llmpipe.run(echo_config(path, *columns, "prompt.template='Q: {q}'"), tmp_path / "run")
    assert [(row["id"], row["completion"]) for row in rows_of(tmp_path / "run")] == [("k0", "Q: q0"), ("k1", "Q: q1")]
    assert (metrics["rows"], metrics["scores"]) == (2, {"exact_match": 1.0})


def test_several_samples_per_row_are_rows_of_their_own(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose
) -> None:
    path = write_jsonl({"prompt": "a"}, b"{bad", {"prompt": "b", "sampling": {"n": 1}})
    metrics = llmpipe.run(echo_config(path, "sampling.n=2"), tmp_path / "run")
    found = [(row["id"], row["sample"], row["completion"]) for row in rows_of(tmp_path / "run")]
    assert found == [("row-0", 0, "a"), ("row-0", 1, "a"), ("row-1", 0, None), ("row-2", 0, "b")]
    assert (metrics["rows"], metrics["rows_ok"], metrics["rows_error"], metrics["completions"]) == (3, 2, 1, 3)


def test_the_sample_column_is_there_even_if_every_row_fails(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose
) -> None:
    llmpipe.run(echo_config(write_jsonl({"prompt": ""}), "sampling.n=2"), tmp_path / "run")
    assert rows_of(tmp_path / "run")[0]["sample"] == 0


def test_metrics_say_what_was_run_on_what(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose
) -> None:
    path = write_jsonl({"prompt": "a b", "reference": "a b"}, {"prompt": "c", "reference": 5}, {"prompt": "d"})
    given = llmpipe.run(echo_config(path, "seed=3"), tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_bytes())
    assert metrics == given == llmpipe.read_run(tmp_path / "run").metrics
    assert (metrics["prompt_tokens"], metrics["completion_tokens"]) == (4, 4)
    assert metrics["scores"] == {"exact_match": 0.5} and metrics["scored_samples"] == {"exact_match": 2}
    assert set(metrics["latency_s"]) == {"p50", "p90", "p99", "mean", "max"}
    assert metrics["wall_s"] > 0 and metrics["load_s"] >= 0 and metrics["peak_rss_mb"] > 10
    assert (metrics["seed"], metrics["prompt_format"], metrics["output"]) == (3, "raw", "outputs.jsonl")
    (asked,) = saved(tmp_path / "run", "fingerprint")
    assert metrics["dataset_digest"] == asked["dataset"]["digest"]


def test_the_peak_memory_is_also_that_of_writing_the_answers(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = -1

    def score(completion: str, reference: str) -> float:  # which happens while answers are written
        block = bytearray(size)
        time.sleep(0.05)
        return float(len(block) > 0)

    monkeypatch.setitem(llmpipe.scorers.SCORERS, "exact_match", score)
    config = echo_config(write_jsonl({"prompt": "a", "reference": "a"}), "metrics.memory_interval_s=0.01")
    with pytest.raises(ValueError, match="negative"):  # all is generated, and nothing written
        llmpipe.run(config, tmp_path / "run")
    before, size = psutil.Process().memory_info().rss / 1e6, 400_000_000
    first = llmpipe.run(config, tmp_path / "run")
    assert first["peak_rss_mb"] > before + 200
    (tmp_path / "run" / "metrics.json").unlink()
    size = 1
    assert llmpipe.run(config, tmp_path / "run") == first


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("output", ["jsonl", "parquet"])
def test_a_data_frame_with_gaps_means_what_it_says(
    tmp_path: Path, echo_config: Compose, asked: list[Any], format: str, output: str
) -> None:
    frame = pd.DataFrame(
        {
            "id": [7, 8, None],
            "prompt": ["4", "one two three", "True"],
            "reference": [4, 1, None],
            "sampling": [
                {"max_tokens": 2.0, "n": None},
                {"max_tokens": 1.0, "n": 2.0},
                {"max_tokens": None, "n": None},
            ],
        }
    )
    path = tmp_path / f"a.{format}"
    if format == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif format == "csv":
        frame.assign(sampling=frame["sampling"].map(json.dumps)).to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    metrics = llmpipe.run(echo_config(path, f"output={output}"), tmp_path / "run")
    assert (metrics["rows_error"], metrics["scores"]) == (0, {"exact_match": pytest.approx(1 / 3)})
    assert asked == [(0, (0,)), (1, (0, 1)), (2, (0,))]
    rows = llmpipe.read_run(tmp_path / "run").rows
    assert rows["completion"].tolist() == ["4", "one", "one", "True"]
    names = ["7.0", "8.0", "8.0"] if format == "csv" else ["7", "8", "8"]  # what CSV has is text
    assert list(map(str, rows["id"])) == [*names, "row-2"]


def test_of_several_right_answers_any_will_do(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose
) -> None:
    rows = [{"prompt": "five", "reference": ["5", "five"]}, {"prompt": "six", "reference": ["7"]}]
    rows.append({"prompt": "[]", "reference": []})
    llmpipe.run(echo_config(write_jsonl(*rows)), tmp_path / "run")
    assert llmpipe.read_run(tmp_path / "run").rows["score_exact_match"].tolist() == [1.0, 0.0, 1.0]


def test_what_is_hardly_meant_is_warned_of(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    llmpipe.run(echo_config(write_jsonl(), "sampling.n=2"), tmp_path / "run")
    assert caplog.messages == [
        "the dataset has no rows",
        "sampling.n=2, and all will be alike: sampling.temperature is 0",
    ]


def test_an_attempt_that_had_nothing_left_to_do_does_not_hide_what_the_others_did(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = itertools.count(1)
    monkeypatch.setattr(EchoRunner, "info", lambda self: {"model": "none", "device": "cpu", "attempt": next(attempts)})
    config = echo_config(write_jsonl({"prompt": "a"}, b"{bad"), "on_error=stop")
    with pytest.raises(RunStopped):
        llmpipe.run(config, tmp_path / "run")
    assert llmpipe.run(config, tmp_path / "run")["runner"]["attempt"] == 1


def test_metrics_say_when(tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose) -> None:
    metrics = llmpipe.run(echo_config(write_jsonl({"prompt": "a"})), tmp_path / "run")
    started, finished = map(datetime.fromisoformat, (metrics["started_at"], metrics["finished_at"]))
    assert timedelta() <= finished - started < timedelta(minutes=1) and started.utcoffset() == timedelta()


@pytest.mark.parametrize("backend", ["llama_cpp", "transformers", "isolated"])
def test_a_resumed_run_tells_its_chat_template_the_time_at_which_it_began(
    backend: str, tmp_path: Path, write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ raise_exception(strftime_now('%Y-%m-%d %H:%M')) }}")
    how = ["backend=llama_cpp", "backend.isolation=true"] if backend == "isolated" else [f"backend={backend}"]
    config = llmpipe.compose(
        [
            *how,
            "device=cpu",
            f"backend.chat_template={template}",
            f"dataset.path={write_jsonl({'prompt': 'a'}, {'prompt': 'b'})}",
            "on_error=stop",
        ]
    )
    try:
        for zone, now in (("EAST-5:30", "2024-02-28T20:00:00+00:00"), ("WEST+8", "2024-06-01T20:00:00+00:00")):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            monkeypatch.setattr("llmpipe.attempt.utc_now", lambda now=now: now)
            with pytest.raises(RunStopped):
                llmpipe.run(config, tmp_path / "run")
    finally:
        monkeypatch.undo()
        time.tzset()
    llmpipe.run(config, tmp_path / "run")
    assert [row["reason"].rpartition(": ")[2] for row in errors_of(tmp_path / "run")] == ["2024-02-29 01:30"] * 2


def test_columns_that_look_meant_and_that_nothing_reads_are_mentioned_once(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"prompt": "a", "tools": [{"name": "f"}], "functions": "none"}
    llmpipe.run(echo_config(write_jsonl(*[row] * 3)), tmp_path / "run")
    (said,) = caplog.messages
    assert said == "nothing reads the columns functions (see dataset.columns.tools), tools (prompts go in raw)"


@pytest.mark.parametrize("option", ["tools=[{name:f}]", "chat_template_kwargs={a:1}", "system=Hi"])
def test_what_only_chats_have_is_refused_where_prompts_go_in_raw(
    option: str, tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose
) -> None:
    with pytest.raises(LLMConfigError, match=f"prompt.{option.partition('=')[0]}= needs chats"):
        llmpipe.run(echo_config(write_jsonl({"prompt": "a"}), "prompt=raw", f"prompt.{option}"), tmp_path / "raw")
    messages = [{"role": "user", "content": "a"}]
    chats = echo_config(write_jsonl({"messages": messages}), "prompt=raw", f"prompt.{option}")
    assert llmpipe.run(chats, tmp_path / "chats")["rows_ok"] == 1


@pytest.mark.parametrize("backend", ["llama_cpp", "transformers"])
def test_a_run_goes_on_from_a_last_message_and_reads_parts_and_refuses_pictures(
    backend: str, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    asked = {"role": "user", "content": [{"type": "text", "text": "What is the capital of "}, {"text": "France?"}]}
    rows = [
        {"messages": [asked]},
        {"messages": [asked, {"role": "assistant", "content": "Par"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
    ]
    config = llmpipe.compose([f"backend={backend}", "device=cpu", f"dataset.path={write_jsonl(*rows)}"])
    assert llmpipe.run(config, tmp_path / "run")["rows_ok"] == 2
    assert [row["completion"] for row in rows_of(tmp_path / "run")[:2]] == ["Paris", "is"]
    (error,) = errors_of(tmp_path / "run")
    assert "a content part of type 'image_url', and only text can be run" in error["reason"]


def test_a_config_of_the_library_runs_in_a_directory_given_as_text(
    tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    config = llmpipe.compose(["backend=echo", f"dataset.path={write_jsonl({'prompt': 'a'})}", "sampling.max_tokens=5"])
    assert isinstance(config, llmpipe.RunConfig)
    assert config.sampling.max_tokens == 5
    told: list[tuple[int, int, int]] = []
    llmpipe.run(config, str(tmp_path / "run"), progress=lambda p: told.append((p.done, p.expected, p.tokens)))
    assert told[-1] == (1, 1, 1)
    with pytest.raises(LLMConfigError, match="max_tokens=0"):
        llmpipe.compose(["sampling.max_tokens=0"])

"""Hostile datasets: a bad row is an error row that says what is wrong with it, and its neighbours do not notice."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import hostile
import pytest
from hostile import Bad, good_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import errors_of

import llmpipe
from llmpipe import LLMConfigError
from llmpipe.datasets.csv import read_csv
from llmpipe.exceptions import RunStopped
from llmpipe.progress import Progress
from llmpipe.stopping import RATED_FROM

Compose = Callable[..., llmpipe.RunConfig]
TIMES = re.compile(rb'"(queue_s|first_token_s|latency_s)":[^,]*,')
wild = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


BASE = llmpipe.compose(["backend=echo"])


def run(path: Path, *overrides: str) -> Path:
    config = llmpipe.compose(["backend=echo", *overrides]) if overrides else BASE
    directory = path.parent / f"run {path.stem}"
    llmpipe.run(replace(config, dataset=replace(config.dataset, path=str(path))), directory)
    return directory


def lines_of(directory: Path) -> list[bytes]:
    """Return the output rows without the columns of times."""
    return [TIMES.sub(b"", line) for line in (directory / "outputs.jsonl").read_bytes().split(b"\n")[:-1]]


def good_lines(directory: Path) -> list[bytes]:
    return [line for line in lines_of(directory) if b'"good ' in line]


def check_errors(directory: Path, path: Path, expected: Sequence[tuple[int, str]]) -> None:
    found = errors_of(directory)
    assert [(error["line"], error["file"]) for error in found] == [(line, str(path)) for line, _ in expected]
    for error, (_, reason) in zip(found, expected, strict=True):
        assert reason in error["reason"]


# --- known evil -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", hostile.WRITERS)
def test_bad_rows_are_error_rows_and_change_no_byte_of_their_neighbours(tmp_path: Path, format: str) -> None:
    write, bad = hostile.WRITERS[format]
    good = good_rows(len(bad) + 1)
    clean, dirty = write(tmp_path / f"clean.{format}", good, []), write(tmp_path / f"dirty.{format}", good, bad)
    found = run(dirty.path)
    assert good_lines(found) == good_lines(run(clean.path)) and len(good_lines(found)) == len(good)
    assert len(lines_of(found)) == len(good) + len(bad)
    check_errors(found, dirty.path, dirty.errors)


@pytest.mark.parametrize("format", hostile.WRITERS)
def test_bad_rows_have_their_place_in_parquet_too(tmp_path: Path, format: str) -> None:
    write, bad = hostile.WRITERS[format]
    good = good_rows(len(bad))
    dirty = write(tmp_path / f"dirty.{format}", good, bad)
    rows = llmpipe.read_run(run(dirty.path, "output=parquet")).rows.to_dict("records")
    texts = [row["prompt"] for row in good]
    assert [row["prompt"] for row in rows[::2]] == [row["completion"] for row in rows[::2]] == texts
    assert [row["id"] for row in rows[::2]] == [row["id"] for row in good]
    for row, (_, reason) in zip(rows[1::2], dirty.errors, strict=True):
        assert reason in row["error"]


def test_what_a_model_cannot_take_is_an_error_row_and_changes_no_byte_of_its_neighbours(tmp_path: Path) -> None:
    questions = [{"id": f"good {i}", "prompt": f"What is {i} + {i}?"} for i in range(8)]
    first = [{"role": "assistant", "content": "I speak first."}, {"role": "user", "content": "hi"}]
    bad = [
        Bad(b'{"prompt": "%s"}' % (b"many words " * 200), "the context of 64 leaves room for 63"),
        Bad(json.dumps({"messages": first}).encode(), "assistant"),
        Bad(b'{"prompt": "x", "sampling": {"logit_bias": {"999999": 1}}}', "999999"),
        Bad(b'{"prompt": "x", "sampling": {"top_k": 1e30}}', "top_k"),
    ]
    options = [
        "backend=llama_cpp",
        "backend.reproducible=true",
        "backend.threads=1",
        "backend.context=64",
        "sampling.max_tokens=12",
    ]
    clean = hostile.write_jsonl(tmp_path / "clean.jsonl", questions, [])
    dirty = hostile.write_jsonl(tmp_path / "dirty.jsonl", questions, bad)
    found = run(dirty.path, *options)
    assert good_lines(found) == good_lines(run(clean.path, *options))
    check_errors(found, dirty.path, dirty.errors)


# --- unknown evil -----------------------------------------------------------------------------------------------------


@wild
@given(st.lists(hostile.WILD_LINES, max_size=8))
def test_no_line_of_jsonl_changes_a_byte_of_its_neighbours(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    directory = tmp_path_factory.mktemp("wild")
    good = [{**row, "reference": "plain"} for row in good_rows(len(lines) + 1)]
    clean = hostile.write_jsonl(directory / "clean.jsonl", good, [])
    dirty = hostile.write_jsonl(directory / "dirty.jsonl", good, [Bad(line, "") for line in lines])
    found = run(dirty.path)
    assert good_lines(found) == good_lines(run(clean.path))
    places = {error["line"] for error in errors_of(found)}
    assert places <= {line for line, _ in dirty.errors}
    assert len({json.loads(line)["id"] for line in lines_of(found)}) <= len(good) + len(lines)


@wild
@given(
    st.lists(st.tuples(hostile.ONE_LINE, hostile.ONE_LINE), min_size=1, max_size=6),
    st.integers(0, 6),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_a_quote_that_is_never_closed_costs_its_own_line_only(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]], place: int, quoting: int
) -> None:
    directory = tmp_path_factory.mktemp("quote")
    good = [{"id": f"good {i}", "prompt": f"p{one}", "note": two} for i, (one, two) in enumerate(cells)]
    before, after = good[:place], good[place:]
    clean = hostile.write_csv(directory / "clean.csv", good, [], quoting)
    dirty = hostile.write_csv(directory / "dirty.csv", before, [], quoting).path
    text = dirty.read_bytes() + b'bad,"never closed,n\n'
    hostile.write_csv(dirty, after, [], quoting)
    dirty.write_bytes(text + dirty.read_bytes().split(b"\r\n", 1)[1])
    found = run(dirty)
    assert good_lines(found) == good_lines(run(clean.path))
    line = len(before) + 2
    check_errors(found, dirty, [(line, f"a quote that opens on line {line} is never closed")])


def test_a_quote_that_is_never_closed_is_found_before_it_has_swallowed_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmpipe.datasets.csv.MAX_ROW_LINES", 10)
    text = "".join(f"good {i},p{i}\n" for i in range(100))
    longest = "line\n" * 9
    more = text.replace("good", "more")
    (tmp_path / "a.csv").write_text(f'id,prompt\nbad,"open\n{text}longest,"{longest}"\n{more}')
    found = run(tmp_path / "a.csv")
    assert len(good_lines(found)) == 100 and len(lines_of(found)) == 202
    check_errors(found, tmp_path / "a.csv", [(2, "a quote that opens on line 2 is never closed")])


def test_a_quote_that_is_never_closed_holds_no_large_file_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmpipe.datasets.csv.MAX_ROW_LINES", 10)
    file = io.BytesIO(b'id,prompt\nbad,"open\n' + b"1,a\n" * 100_000)
    monkeypatch.setattr("llmpipe.datasets.csv.open_bytes", lambda path: file)
    rows = read_csv(Path("a.csv"))
    assert next(rows).line == 2
    assert file.tell() < 20_000


def test_a_header_that_is_never_closed_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,"prompt\n1,a\n')
    with pytest.raises(llmpipe.DatasetError, match=r"a\.csv cannot be read to its end: unexpected end of data"):
        run(tmp_path / "a.csv")


# --- too many errors --------------------------------------------------------------------------------------------------


def test_on_error_stop_ends_the_run_at_an_error_and_each_resumption_goes_on_after_it(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose
) -> None:
    path = write_jsonl({"prompt": "a"}, b"{bad", {"prompt": "b"}, {"prompt": ""}, {"prompt": "c"})
    config = echo_config(path, "on_error=stop")
    for line, reason in ((2, "not valid JSON"), (4, "the prompt is empty")):
        with pytest.raises(RunStopped, match=rf"rows\.jsonl line {line}: {reason}.* llmpipe resume ") as stopped:
            llmpipe.run(config, tmp_path / "run")
        assert "\n" not in str(stopped.value)
        assert not (tmp_path / "run" / "outputs.jsonl").exists()
    metrics = llmpipe.run(config, tmp_path / "run")
    assert (metrics["rows_ok"], metrics["rows_error"]) == (3, 2)
    llmpipe.run(echo_config(path), tmp_path / "whole")
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")
    check_errors(tmp_path / "run", path, [(2, "not valid JSON"), (4, "empty")])


def test_a_stopped_run_says_so_in_a_line_and_resumes_with_another_mind(
    tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl({"prompt": "a"}, b"{bad", {"prompt": ""}, {"prompt": "c"})
    said = []
    for arguments in (
        ["backend=echo", f"dataset.path={path}", "on_error=stop", "hydra.run.dir=out"],
        ["resume", "out", "on_error=quarantine"],
    ):
        command = [sys.executable, "-m", "llmpipe", *arguments]
        said.append(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60))
    assert [one.returncode for one in said] == [1, 3], said
    assert re.fullmatch(r"llmpipe: on_error=stop, .*rows\.jsonl line 2: .*resume \S*out\n", said[0].stderr)


@pytest.mark.parametrize(("rate", "bad", "ends"), [(0.1, 10, False), (0.1, 11, True), (1.0, 100, False)])
def test_a_run_ends_where_more_than_max_error_rate_of_its_rows_are_errors_until_it_is_resumed_with_another(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose, rate: float, bad: int, ends: bool
) -> None:
    rows = [b"{bad" if i < bad else {"prompt": str(i)} for i in range(RATED_FROM)]
    config = echo_config(write_jsonl(*rows, *({"prompt": f"later {i}"} for i in range(900))), f"max_error_rate={rate}")
    for _ in range(2 * ends):  # what the first attempt found, the second knows
        with pytest.raises(
            RunStopped,
            match=rf"{bad} of 100 rows are errors, over max_error_rate=0.1; the last: .*line {bad}: not.*"
            r"llmpipe resume \S+ max_error_rate=null",
        ):
            llmpipe.run(config, tmp_path / "run")
        assert not (tmp_path / "run" / "outputs.jsonl").exists()
    config.max_error_rate = None if ends else rate
    assert llmpipe.run(config, tmp_path / "run")["rows_error"] == bad


def test_a_run_that_was_over_its_error_rate_is_stopped_again_before_the_model_loads(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = echo_config(write_jsonl(b"{bad", {"prompt": "a"}), "max_error_rate=0.4")
    with pytest.raises(RunStopped):
        llmpipe.run(config, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(llmpipe.EchoRunner, "_initialize_model", lambda self: pytest.fail("a model was loaded"))
        with pytest.raises(RunStopped, match=r"1 of 2 rows are errors.*line 1: not valid JSON"):
            llmpipe.run(config, tmp_path / "run")
    config.max_error_rate = 0.5
    assert llmpipe.run(config, tmp_path / "run")["rows_error"] == 1


def test_errors_of_earlier_attempts_count_with_those_of_later_ones(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose
) -> None:
    rows = [b"{bad" if i % 10 == 0 else {"prompt": str(i)} for i in range(300)]  # a tenth, wherever one looks
    rows[280:290] = [b"{bad"] * 10

    def interrupt(progress: Progress) -> None:
        if progress.done == 150:
            raise KeyboardInterrupt

    config = echo_config(write_jsonl(*rows), "max_error_rate=0.12")
    with pytest.raises(KeyboardInterrupt):
        llmpipe.run(config, tmp_path / "run", progress=interrupt)
    with pytest.raises(RunStopped, match=r"3\d of 2\d\d rows are errors, .*line 2\d\d: not"):
        llmpipe.run(config, tmp_path / "run")


def test_rows_are_compared_with_rows_where_each_has_several_answers(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = llmpipe.EchoRunner.stream

    def failing(runner: llmpipe.EchoRunner, requests: Iterable[llmpipe.Request]) -> Iterator[llmpipe.Chunk]:
        for chunk in stream(runner, requests):
            if chunk.text == "bad" and chunk.sample in (1, 3):
                chunk = llmpipe.Chunk(chunk.request_id, chunk.sample, finish_reason="error", error="no luck")
            yield chunk

    monkeypatch.setattr(llmpipe.EchoRunner, "stream", failing)
    path = write_jsonl(b"{bad", *({"prompt": "bad" if i < 4 else "good"} for i in range(9)))
    options = ["sampling.n=4", "sampling.temperature=1"]
    assert llmpipe.run(echo_config(path, *options, "max_error_rate=0.5"), tmp_path / "half")["rows_error"] == 5
    for _ in range(2):
        with pytest.raises(RunStopped, match=r"5 of 10 rows are errors, .*line 5: no luck"):
            llmpipe.run(echo_config(path, *options, "max_error_rate=0.49"), tmp_path / "less")


def test_few_rows_are_rated_when_all_are_done(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose
) -> None:
    path = write_jsonl(b"{bad", *({"prompt": str(i)} for i in range(9)))
    with pytest.raises(RunStopped, match="1 of 10 rows are errors"):
        llmpipe.run(echo_config(path, "max_error_rate=0.05"), tmp_path / "run")
    assert llmpipe.run(echo_config(path, "max_error_rate=0.1"), tmp_path / "run")["rows"] == 10


def test_the_last_rows_of_a_resumed_run_are_too_few_to_be_rated(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Compose
) -> None:
    config = echo_config(write_jsonl(*({"prompt": str(i)} for i in range(150)), b"{bad"), "max_error_rate=0.1")

    def interrupt(progress: Progress) -> None:
        if progress.done == 150:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llmpipe.run(config, tmp_path / "run", progress=interrupt)
    assert llmpipe.run(config, tmp_path / "run")["rows_error"] == 1


@pytest.mark.parametrize("override", ["max_error_rate=0", "max_error_rate=1.5", "max_error_rate=nan"])
def test_a_rate_out_of_bounds_is_refused_with_the_bounds(override: str) -> None:
    with pytest.raises(LLMConfigError, match=r"max_error_rate=.* must be a number in \(0, 1\], or null"):
        llmpipe.compose([override])

"""Which rows of a dataset are run, in which order; and a dataset that has grown: only what is new is run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llmpipe
from llmpipe import Chunk, DatasetError, EchoRunner, LedgerError, LLMConfigError, Request
from llmpipe.config import DatasetConfig
from llmpipe.datasets import Dataset
from llmpipe.datasets.shuffle import permutation
from llmpipe.export import export
from llmpipe.plan import plan
from llmpipe.progress import Progress

Compose = Callable[..., llmpipe.RunConfig]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that reach the runner."""
    prompts: list[str] = []
    stream = EchoRunner.stream

    def noting(self: EchoRunner, given: Iterable[Request]) -> Iterator[Chunk]:
        def noted() -> Iterator[Request]:
            for request in given:
                prompts.append(request.prompt)
                yield request

        yield from stream(self, noted())

    monkeypatch.setattr(EchoRunner, "stream", noting)
    return prompts


def files(directory: Path) -> list[str]:
    """Write thirty rows to files of three formats, and return their names."""
    names = [str(directory / name) for name in ("a.jsonl", "b.parquet", "c.csv")]
    prompts = [f"row {i}" for i in range(30)]
    Path(names[0]).write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts[:10]))
    pq.write_table(pa.table({"prompt": prompts[10:20], "n": range(10, 20)}), names[1], row_group_size=3)
    Path(names[2]).write_text("prompt\n" + "\n".join(prompts[20:]))
    return names


# --- order ------------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 300), st.integers(0, 2**40), st.integers(1, 50), st.integers(0, 40), st.none() | st.integers(0, 40)
)
def test_shuffled_rows_are_all_rows_once_and_keep_their_ids(
    tmp_path_factory: pytest.TempPathFactory, rows: int, seed: int, window: int, offset: int, limit: int | None
) -> None:
    order = permutation(rows, seed).tolist()
    assert sorted(order) == list(range(rows)) and permutation(rows, seed).tolist() == order
    path = tmp_path_factory.mktemp("shuffle") / "a.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(rows)))
    last = None if limit is None else offset + limit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmpipe.datasets.shuffle.WINDOW_ROWS", window)
        found = list(Dataset(DatasetConfig(path=str(path), shuffle=seed, offset=offset, limit=limit)).rows())
    assert [row.values["prompt"] for row in found] == [str(i) for i in order[offset:last]]
    assert [row.index for row in found] == list(range(len(found)))
    assert [row.id("id") for row in found] == [f"row-{i}" for i in order[offset:last]]
    assert [row.line for row in found] == [i + 1 for i in order[offset:last]]


def test_a_permutation_is_the_same_on_every_machine_and_another_for_every_seed() -> None:
    assert permutation(10, 0).tolist() == [2, 4, 6, 8, 5, 1, 7, 0, 9, 3]
    assert len({tuple(permutation(50, seed).tolist()) for seed in range(200)}) == 200


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_shuffled_run_over_files_of_all_formats_is_written_in_its_order(
    tmp_path: Path, echo_config: Compose, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    monkeypatch.setattr("llmpipe.datasets.shuffle.WINDOW_ROWS", 8)
    config = echo_config("x", f"output={format}", "dataset.shuffle=7", "dataset.offset=3", "dataset.limit=20")
    config.dataset.path = files(tmp_path)
    llmpipe.run(config, tmp_path / "run")
    rows = llmpipe.read_run(tmp_path / "run").rows
    expected = permutation(30, 7).tolist()[3:23]
    assert rows["id"].tolist() == [f"row-{i}" for i in expected]
    assert rows["completion"].tolist() == rows["prompt"].tolist() == [f"row {i}" for i in expected]
    assert rows["n"].fillna(-1).tolist() == [i if 10 <= i < 20 else -1 for i in expected]


def test_an_offset_leaves_rows_out_and_the_others_keep_their_ids_and_answers(
    tmp_path: Path, echo_config: Compose, asked: list[str]
) -> None:
    config = echo_config("x", "dataset.offset=12", "dataset.limit=2")
    config.dataset.path = files(tmp_path)
    llmpipe.run(config, tmp_path / "run")
    assert asked == ["row 12", "row 13"]
    assert llmpipe.read_run(tmp_path / "run").rows["id"].tolist() == ["row-12", "row-13"]


@pytest.mark.parametrize("override", ["dataset.offset=-1", "dataset.shuffle=-1"])
def test_what_chooses_no_rows_is_refused(override: str) -> None:
    with pytest.raises(LLMConfigError, match="an integer >= 0"):
        llmpipe.compose([override])


# --- growth -----------------------------------------------------------------------------------------------------------


def write_rows(path: Path, *prompts: str) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


@pytest.mark.parametrize("shuffle", ["null", "5"])
def test_a_larger_limit_runs_the_further_rows_only(
    tmp_path: Path, echo_config: Compose, asked: list[str], shuffle: str
) -> None:
    path = write_rows(tmp_path / "a.jsonl", *"abcdefgh")
    options = [f"dataset.shuffle={shuffle}", "dataset.offset=1"]
    for limit in ("3", "5", "5", "null", "null"):
        llmpipe.run(echo_config(path, *options, f"dataset.limit={limit}"), tmp_path / "run")
    llmpipe.run(echo_config(path, *options), tmp_path / "whole")
    assert asked[:7] == asked[7:] and len(asked) == 14
    run, whole = (llmpipe.read_run(tmp_path / name) for name in ("run", "whole"))
    assert run.rows["completion"].tolist() == whole.rows["completion"].tolist() == asked[:7]
    assert run.metrics["rows"] == 7
    with pytest.raises(LedgerError, match="dataset.limit was None, is 3"):
        llmpipe.run(echo_config(path, *options, "dataset.limit=3"), tmp_path / "run")


def test_rows_that_were_appended_and_files_that_came_are_run_alone(
    tmp_path: Path, echo_config: Compose, asked: list[str]
) -> None:
    write_rows(tmp_path / "a.jsonl", "a", "b")
    config = echo_config(tmp_path / "*.jsonl")
    llmpipe.run(config, tmp_path / "run")
    for path, prompts in ((tmp_path / "a.jsonl", "abc"), (tmp_path / "b.jsonl", "d"), (tmp_path / "b.jsonl", "def")):
        write_rows(path, *prompts)
        assert plan(config, tmp_path / "run")["rows_done"] == len(asked)
        assert export(config, tmp_path / "run").rows == len(asked)
        llmpipe.run(config, tmp_path / "run")
    assert asked == list("abcdef")
    assert llmpipe.read_run(tmp_path / "run").rows["completion"].tolist() == list("abcdef")


def test_a_run_that_was_interrupted_goes_on_with_a_dataset_that_grew_meanwhile(
    tmp_path: Path, echo_config: Compose, asked: list[str]
) -> None:
    config = echo_config(write_rows(tmp_path / "a.jsonl", *"abcd"))

    def interrupt(progress: Progress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llmpipe.run(config, tmp_path / "run", progress=interrupt)
    del asked[2:]
    write_rows(tmp_path / "a.jsonl", *"abcdef")
    with pytest.raises(KeyboardInterrupt):
        llmpipe.run(config, tmp_path / "run", progress=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert llmpipe.run(config, tmp_path / "run")["rows"] == 6
    assert llmpipe.read_run(tmp_path / "run").rows["completion"].tolist() == list("abcdef")


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("xb", "cd", "a.jsonl has other rows than before"),
        ("ab", "c", "b.jsonl has other rows than before"),
        ("abx", "cd", "a.jsonl has other rows than before"),
        ("ab", "", "the 2 rows of .*b.jsonl are gone"),
        ("ab", "cxe", "b.jsonl has other rows than before"),
    ],
)
def test_rows_of_before_that_changed_are_refused_and_the_file_is_named(
    tmp_path: Path, echo_config: Compose, first: str, second: str, said: str
) -> None:
    config = echo_config(tmp_path / "*.jsonl")
    write_rows(tmp_path / "a.jsonl", *"ab"), write_rows(tmp_path / "b.jsonl", *"cd")
    llmpipe.run(config, tmp_path / "run")
    write_rows(tmp_path / "a.jsonl", *first), write_rows(tmp_path / "b.jsonl", *second)
    for start in (llmpipe.run, plan):
        with pytest.raises(LedgerError, match=rf"dataset\.digest was .*{said}"):
            start(config, tmp_path / "run")
    with pytest.raises(DatasetError, match=rf"dataset\.digest was .*{said}"):
        export(config, tmp_path / "run")


@pytest.mark.parametrize("chosen", ["dataset.limit=1", "dataset.offset=1", "dataset.shuffle=1"])
def test_other_rows_of_a_file_are_not_said_to_be_a_change_of_it(
    tmp_path: Path, echo_config: Compose, chosen: str
) -> None:
    path = write_rows(tmp_path / "a.jsonl", *"abcdefgh")
    llmpipe.run(echo_config(path), tmp_path / "run")
    with pytest.raises(LedgerError, match="holds a run of another configuration") as refused:
        llmpipe.run(echo_config(path, chosen), tmp_path / "run")
    assert chosen.partition("=")[0] in str(refused.value) and "than before" not in str(refused.value)


def test_growth_does_not_hide_another_difference(tmp_path: Path, echo_config: Compose) -> None:
    path = write_rows(tmp_path / "a.jsonl", *"ab")
    llmpipe.run(echo_config(path), tmp_path / "run")
    write_rows(path, *"abc")
    with pytest.raises(LedgerError, match="another configuration: seed was 0, is 1. Drop"):
        llmpipe.run(echo_config(path, "seed=1"), tmp_path / "run")


def test_a_dataset_is_the_same_under_another_name_and_packing(
    tmp_path: Path, echo_config: Compose, asked: list[str]
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a"}, {"prompt": "b"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "b.json"):
        llmpipe.run(echo_config(tmp_path / name), tmp_path / "run")
    assert asked == ["a", "b"]

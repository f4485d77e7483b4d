"""Memory does not grow with a dataset, with its rows beyond one row, or with the number of their keys."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpipe import RunConfig
from llmpipe.outputs import Answered, ColumnTypes, Layout, arrow_types, parquet, read_run
from llmpipe.outputs.arrow_types import REST
from llmpipe.outputs.parquet import ParquetWriter
from llmpipe.pipeline import run
from llmpipe.records import Completion, Row

Config = Callable[..., RunConfig]

_RUN = """
import resource, sys
from llmpipe import compose
from llmpipe.pipeline import run
run(compose(sys.argv[2:]), sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak_mb(directory: Path, *overrides: str, limit_mb: int = 4000) -> int:
    """Run in a process of its own, with so much address space, and return the most memory that it held, in MB."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit_mb * 2**20, limit_mb * 2**20))

    command = [sys.executable, "-c", _RUN, str(directory), "backend=echo", "sampling.max_tokens=4", *overrides]
    done = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])


def write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> Path:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


# --- Parquet ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [800, pytest.param(9000, marks=pytest.mark.slow)])
def test_parquet_is_written_in_groups_of_so_many_bytes(tmp_path: Path, rows: int) -> None:
    dataset = write_rows(tmp_path / "d.jsonl", ({"prompt": "hi", "text": f"{i:8}" * 2**15} for i in range(rows)))
    assert peak_mb(tmp_path / "run", f"dataset.path={dataset}", "output=parquet") < 500
    file = pq.ParquetFile(tmp_path / "run" / "outputs.parquet")
    assert file.metadata.num_rows == rows
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert max(groups) < 300 < sum(groups[:2])


def test_ordinary_rows_are_written_in_groups_of_thousands(tmp_path: Path, echo_config: Config) -> None:
    dataset = write_rows(tmp_path / "d.jsonl", ({"prompt": "hi", "n": i} for i in range(10000)))
    run(echo_config(dataset, "output=parquet"), tmp_path / "run")
    file = pq.ParquetFile(tmp_path / "run" / "outputs.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [8192, 1808]


@pytest.mark.parametrize("rows", [3000, pytest.param(40000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", ["columns", "objects", "nested"])
def test_keys_of_their_own_in_each_row_take_no_memory(
    tmp_path: Path, rows: int, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(i: int) -> dict[str, Any]:
        key = f"key {i}"
        return {key: i} if shape == "columns" else {"d": {key: i} if shape == "objects" else {f"{i % 97}": {key: i}}}

    dataset = write_rows(tmp_path / "d.jsonl", ({"prompt": "hi", **own(i)} for i in range(rows)))
    assert peak_mb(tmp_path / "run", f"dataset.path={dataset}", "output=parquet") < 450
    answers, _ = read_run(tmp_path / "run")
    assert answers["prompt"].tolist() == ["hi"] * rows
    if shape == "columns":
        first = [name for name in answers if name.startswith("key ")]
        assert first == [f"key {i}" for i in range(999)]
        assert answers["key 7"].dropna().to_dict() == {7: 7}
        assert answers[REST][999:].tolist() == [own(i) for i in range(999, rows)]
    else:
        assert answers["d"].tolist() == [own(i)["d"] for i in range(rows)]


def test_it_is_said_once_what_is_kept_as_json_for_its_many_keys(
    tmp_path: Path, echo_config: Config, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrow_types, "MAX_FIELDS", 4)
    rows = [{"prompt": "hi", "few": {"a": i}, "many": {f"k{i}": i}, "some": {"b": i}} for i in range(9)]
    dataset = write_rows(tmp_path / "d.jsonl", iter([*rows, {"prompt": "hi", **{f"c{i}": i for i in range(5)}}]))
    caplog.set_level("INFO")
    run(echo_config(dataset, "output=parquet"), tmp_path / "run")
    said = [record.getMessage() for record in caplog.records if "kept as JSON" in record.getMessage()]
    assert said == ["kept as JSON text, as their objects have ever other keys: the columns many"]
    schema = pq.read_schema(tmp_path / "run" / "outputs.parquet")
    assert str(schema.field("few").type) == "struct<a: int64>"


def test_a_table_that_is_as_wide_in_every_row_stays_one(tmp_path: Path, echo_config: Config) -> None:
    row = {"prompt": "hi"} | {f"c{i}": i for i in range(1500)}
    dataset = write_rows(tmp_path / "d.jsonl", iter([row, row | {"late": 1}]))
    run(echo_config(dataset, "output=parquet"), tmp_path / "run")
    schema = pq.read_schema(tmp_path / "run" / "outputs.parquet")
    assert schema.names[:1502] == [*row, "late"]


_SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=5)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcdefgh"), inner, max_size=4),
    max_leaves=8,
)
_ROWS = st.lists(st.dictionaries(st.sampled_from([f"c{i}" for i in range(12)]), _VALUES, max_size=6), max_size=12)


@given(rows=_ROWS, group_bytes=st.sampled_from([1, 300, 2**26]), room=st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_whatever_the_groups_and_the_room_for_columns_rows_read_back_the_same(
    rows: list[dict[str, Any]], group_bytes: int, room: int
) -> None:
    given = [Row("d.jsonl", i + 1, {"prompt": "hi", **row}, index=i) for i, row in enumerate(rows)]
    layout = Layout("", "id", adds_id=True, sample=False, truncated=False, scorers=())
    with pytest.MonkeyPatch.context() as patch, io.BytesIO() as file:
        patch.setattr(arrow_types, "MAX_FIELDS", room)
        patch.setattr(parquet, "GROUP_BYTES", group_bytes)
        types = ColumnTypes()
        for row in given:
            types.add(row)
        writer = ParquetWriter(file, layout, types)
        for row in given:
            writer.write(Answered(row, Completion(row.index, text="answer")))
        writer.finish()
        whole = pq.read_table(io.BytesIO(file.getvalue()))
    found = whole.to_pylist()
    as_json = [field.name for field in whole.schema if (field.metadata or {}).get(b"llmpipe") == b"json"]
    for row, answer in zip(rows, found, strict=True):
        answer |= {name: json.loads(answer[name]) for name in as_json if answer[name] is not None}
        own = {**answer, **(answer.get(REST) or {})}
        for name, value in row.items():
            assert _said(own.get(name)) == _said(value)


def _said(value: Any) -> Any:
    """Return a value without the nulls in its objects, of which a struct has one for each key that is not there."""
    if isinstance(value, dict):
        return {name: said for name, inner in value.items() if (said := _said(inner)) not in (None, {})}
    return [_said(inner) for inner in value] if isinstance(value, list) else value

"""Memory does not grow with a dataset, with its rows beyond one row, or with the number of their keys."""

from __future__ import annotations

import gzip
import io
import json
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpipe import RunConfig, compose
from llmpipe.config import ColumnsConfig, DatasetConfig
from llmpipe.datasets import Dataset, shuffle
from llmpipe.datasets import json as json_format
from llmpipe.exceptions import DatasetError, LedgerError, LLMConfigError, LLMError
from llmpipe.ledger import Ledger
from llmpipe.ledger.faults import faults_named
from llmpipe.outputs import Answered, ColumnTypes, Layout, arrow_types, parquet, read_run
from llmpipe.outputs.arrow_types import REST
from llmpipe.outputs.parquet import ParquetWriter
from llmpipe.pipeline import run
from llmpipe.records import Completion, Row, failed
from llmpipe.runners.chat import read_template

Config = Callable[..., RunConfig]

_PEAK = """
import re
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""
"""Not `getrusage`: that counts what the parent held when it made the process."""
_RUN = (
    """
import sys
from llmpipe import compose
from llmpipe.pipeline import run
run(compose(sys.argv[2:]), sys.argv[1])
"""
    + _PEAK
)


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


# --- rows that are too large ------------------------------------------------------------------------------------------

LARGE_MB = 150
"""Of a row that is packed small; to hold it once would take more memory than the tests allow."""
_READ = (
    """
import json, sys
from llmpipe.config import DatasetConfig
from llmpipe.datasets import Dataset
rows = Dataset(DatasetConfig(path=sys.argv[1], **json.loads(sys.argv[2]))).rows()
print(json.dumps([[row.line, row.values.get("prompt"), row.error, len(row.raw or b"")] for row in rows]))
"""
    + _PEAK
)


def rows_and_peak_mb(path: Path, **options: Any) -> tuple[list[list[Any]], int]:
    """Read a file in a process of its own; return line, prompt, error and size of what is kept of each row."""
    command = [sys.executable, "-c", _READ, str(path), json.dumps({"max_row_mb": 8, **options})]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows, peak = done.stdout.splitlines()
    return json.loads(rows), int(peak)


def large(before: bytes, filling: bytes, after: bytes) -> Iterator[bytes]:
    yield before
    for _ in range(LARGE_MB):
        yield filling * (10**6 // len(filling))
    yield after


def packed(path: Path, pieces: Iterator[bytes]) -> Path:
    """Write bytes to a file, packed as its name says."""
    pack = zstandard.open(path, "wb") if path.suffix == ".zst" else gzip.open(path, "wb", compresslevel=1)
    with pack as file:
        for piece in pieces:
            file.write(piece)
    return path


_JSONL = b'{"prompt": "one"}\n', b'\n\n{"prompt": "two"}\n'
_LIST = b'[{"prompt": "one"},\n', b',\n\n{"prompt": "two"}]'
_CSV = b"prompt,x\none,1\n", b"\n\ntwo,2\n"


@pytest.mark.parametrize(
    ("name", "before", "filling", "after"),
    [
        ("zeros.jsonl.gz", _JSONL[0], b"\0", _JSONL[1]),
        ("blanks.jsonl.zst", _JSONL[0], b" ", _JSONL[1]),
        ("text.jsonl.gz", _JSONL[0] + b'{"prompt": "', b"a", b'"}' + _JSONL[1]),
        ("digits.jsonl.zst", _JSONL[0] + b'{"prompt": 1', b"0", b"}" + _JSONL[1]),
        ("text.json.gz", _LIST[0] + b'{"prompt": "', b'a\\"', b'"}' + _LIST[1]),
        ("key.json.gz", _LIST[0] + b'{"', b"{", b'": 1}' + _LIST[1]),
        ("many.json.zst", _LIST[0] + b'{"x": [1', b',{"a":[]}' + b" " * 1000, b"]}" + _LIST[1]),
        ("digits.json.zst", _LIST[0] + b"1", b"0", _LIST[1]),
        ("string.json.zst", _LIST[0] + b'"', b"a", b'"' + _LIST[1]),
        ("field.json.gz", b'{"data":' + _LIST[0] + b'{"p": "', b"a", b'"}' + _LIST[1] + b"}"),
        ("line.csv.gz", _CSV[0], b"a", _CSV[1]),
        ("cell.csv.zst", _CSV[0] + b'"', b"a", b'"' + _CSV[1]),
        ("cells.tsv.zst", _CSV[0].replace(b",", b"\t"), b"a\t", _CSV[1].replace(b",", b"\t")),
    ],
)
def test_a_row_that_is_too_large_is_an_error_row_and_those_around_it_are_read(
    tmp_path: Path, name: str, before: bytes, filling: bytes, after: bytes
) -> None:
    rows, peak = rows_and_peak_mb(packed(tmp_path / name, large(before, filling, after)))
    assert peak < 160
    first = 1 if ".json" in name else 2
    assert [row[:2] for row in rows] == [[first, "one"], [first + 1, None], [first + 3, "two"]]
    assert rows[1][2] == "larger than the 8 MB that a row may have (dataset.max_row_mb=)"
    assert 0 < rows[1][3] <= 1000


def test_a_file_in_utf_16_may_hold_a_row_that_is_too_large(tmp_path: Path) -> None:
    texts = (piece.decode().encode("utf-16-le") for piece in large(*_parts(b"a")))
    rows, peak = rows_and_peak_mb(packed(tmp_path / "d.jsonl.gz", texts))
    assert (peak < 160, [row[1] for row in rows]) == (True, ["one", None, "two"])


def _parts(filling: bytes) -> tuple[bytes, bytes, bytes]:
    return _JSONL[0] + b'{"prompt": "', filling, b'"}' + _JSONL[1]


def test_one_object_that_is_too_large_is_an_error_row(tmp_path: Path) -> None:
    for number, (before, after) in enumerate([(b'{"prompt": "', b'"}'), (b'{"data": {"', b'": []}}')]):
        rows, peak = rows_and_peak_mb(packed(tmp_path / f"{number}.json.gz", large(before, b"a", after)))
        assert (peak < 160, [row[2][:11] for row in rows]) == (True, ["larger than"])


def test_a_key_on_the_way_to_the_rows_that_is_too_large_is_refused(tmp_path: Path) -> None:
    path = packed(tmp_path / "d.json.gz", large(b'{"', b"a", b'": 1, "data": []}'))
    command = [sys.executable, "-c", _READ, str(path), json.dumps({"max_row_mb": 8, "field": "data"})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"{path} cannot be read to its end: line 1: more than the 8 MB that may stand there" in done.stderr


def test_a_quote_that_is_not_closed_within_the_size_of_a_row_costs_its_own_line(tmp_path: Path) -> None:
    lines = (b"x" * 10**5 + b"\n" for _ in range(200))
    path = tmp_path / "d.csv"
    path.write_bytes(b'prompt\none\n"open\n' + b"".join(lines) + b"two\n")
    rows, _ = rows_and_peak_mb(path)
    assert [len(rows), rows[0][1], rows[1][0], rows[-1][:2]] == [203, "one", 3, [204, "two"]]
    assert rows[1][2] == (
        "not valid CSV: a quote that opens on line 3 is never closed within the 8 MB of dataset.max_row_mb="
    )


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("length", range(60, 72))
def test_lines_of_any_length_around_the_limit_keep_their_numbers(
    tmp_path: Path, end: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(end.join(["prompt", "x" * length, "two", "y" * (2**16 + length), "four", ""]).encode())
    found = list(Dataset(DatasetConfig(path=str(path), max_row_mb=64 / 1e6)).rows())
    assert [row.line for row in found] == [2, 3, 4, 5]
    assert [row.error is not None for row in found] == [length + len(end) > 64 and found[0].error is not None, 0, 1, 0]
    assert (found[0].error is None) == (length + len(end) <= 64)


def test_a_row_of_parquet_that_is_too_large_is_an_error_row(tmp_path: Path) -> None:
    texts = ["one", "a" * 10**7, "two"]
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "d.parquet", compression="zstd")
    rows, _ = rows_and_peak_mb(tmp_path / "d.parquet")
    assert [row[1] for row in rows] == ["one", None, "two"]
    assert rows[1][2] == "larger than the 8 MB that a row may have (dataset.max_row_mb=)"


@pytest.mark.parametrize(
    ("texts", "most_mb"),
    [(["a" * 2**20] * 200, 400), ([f"{i:8}" * 2**17 for i in range(200)], 400), (["short", *["a" * 2**20] * 800], 700)],
    ids=["alike", "different", "alike but the first"],
)
def test_of_a_parquet_file_of_large_rows_few_are_held(tmp_path: Path, texts: list[str], most_mb: int) -> None:
    options = {"compression": "zstd", "write_batch_size": 4, "dictionary_pagesize_limit": 2**22}
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "d.parquet", **options)
    command = _READ[: _READ.index("print(json")] + "print(sum(1 for _ in rows))" + _PEAK
    done = subprocess.run(
        [sys.executable, "-c", command, str(tmp_path / "d.parquet"), "{}"], capture_output=True, text=True, check=True
    )
    count, peak = map(int, done.stdout.split())
    assert (count, peak < most_mb) == (len(texts), True), peak


def test_shuffled_rows_are_held_up_to_a_size(tmp_path: Path) -> None:
    dataset = write_rows(tmp_path / "d.jsonl", ({"prompt": f"{i:8}" * 2**15} for i in range(400)))
    command = "from llmpipe.datasets import shuffle\nshuffle.WINDOW_BYTES = 2**24" + _READ.replace(
        "print(json.dumps(", "print(len("
    )
    done = subprocess.run(
        [sys.executable, "-c", command, str(dataset), '{"shuffle": 1}'], capture_output=True, text=True, check=True
    )
    count, peak = map(int, done.stdout.split())
    assert (count, peak < 180) == (400, True), peak


@given(places=st.permutations(range(24)), sizes=st.lists(st.integers(1, 40), min_size=24, max_size=24), parquet=...)
@settings(max_examples=60, deadline=None)
def test_whatever_the_window_each_row_comes_once_and_in_its_order(
    places: list[int], sizes: list[int], parquet: bool
) -> None:
    def rows() -> Iterator[Row]:
        texts = ["x" * size for size in sizes]
        batches = pa.table({"a": texts}).to_batches(max_chunksize=5)
        for i, text in enumerate(texts):
            batch = (batches[i // 5], i % 5) if parquet else None
            yield Row("f", i, {"a": text}, text.encode(), batch=batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "WINDOW_BYTES", 100)
        found = list(shuffle.rows_at(np.asarray(places), rows))
    assert [row.line for row in found] == places
    if parquet:
        assert [row.batch and row.batch[0].column("a")[row.batch[1]].as_py() for row in found] == [
            row.values["a"] for row in found
        ]


_JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=30), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(
    values=st.lists(_JSON, max_size=8),
    block=st.integers(1, 50),
    few=st.integers(1, 9),
    most=st.integers(1, 80),
    indent=st.sampled_from([None, 1]),
)
@settings(max_examples=200, deadline=None)
def test_whatever_json_holds_the_rows_up_to_a_size_are_read_and_the_others_are_errors(
    values: list[Any], block: int, few: int, most: int, indent: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text("[" + ",\n".join(json.dumps(value, indent=indent) for value in values) + "]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_format, "_BLOCK", block)
        patch.setattr(json_format, "_FEW", few)
        found = list(json_format.read_json(path, DatasetConfig(path=str(path), max_row_mb=most / 1e6)))
    assert len(found) == len(values)
    for value, row in zip(values, found, strict=True):
        if len(json.dumps(value, indent=indent).encode()) > most:
            assert row.error is not None and row.error.startswith("larger than")
        elif isinstance(value, dict):
            assert row.values == value
        else:
            assert row.error is not None and "not an object" in row.error


def test_the_brackets_of_a_row_that_has_very_many_are_not_looked_at_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "brackets.json"
    path.write_bytes(b'[{"x": [' + b'[{"]": "["}], [],' * 200_000 + b'1]}, {"prompt": "b"}]')

    def seconds(few: int) -> float:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_format, "_FEW", few)
            begin = time.thread_time()
            rows = json_format.read_json(path, DatasetConfig(path=str(path), max_row_mb=0.1))
            assert [row.error is None for row in rows] == [False, True]
            return time.thread_time() - begin

    one_by_one = seconds(10**9)
    assert seconds(json_format._FEW) < one_by_one / 2


# --- columns, answers, messages ---------------------------------------------------------------------------------------


def test_a_missing_column_among_a_hundred_thousand_is_said_in_a_line(tmp_path: Path) -> None:
    dataset = write_rows(tmp_path / "d.jsonl", iter([{f"c{i}": 1 for i in range(100_000)}]))
    with pytest.raises(DatasetError, match=r"it has: c0, c1, .* c19 and 99,980 more") as caught:
        Dataset(DatasetConfig(path=str(dataset), columns=ColumnsConfig(prompt="nope"))).scan()
    assert len(str(caught.value)) < 1000


def test_of_ever_new_columns_those_that_matter_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmpipe.datasets.dataset.MAX_COLUMNS", 5)
    rows = [{"prompt": "hi", f"key {i}": i} for i in range(100)]
    dataset = write_rows(tmp_path / "d.jsonl", iter([*rows, {"prompt": "hi", "reference": "x", "completion": "taken"}]))
    with pytest.raises(DatasetError, match="already has the column 'completion'"):
        run(compose(["backend=echo", f"dataset.path={dataset}"]), tmp_path / "run")
    scan = Dataset(DatasetConfig(path=str(dataset))).scan()
    assert len(scan.columns) < 10 and {"prompt", "reference"} <= set(scan.columns)


@pytest.mark.parametrize("text", ["answer", "error"])
def test_what_sqlite_does_not_hold_is_an_error_row_of_its_own(tmp_path: Path, text: str) -> None:
    with Ledger(tmp_path, {}) as ledger:
        ledger._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)
        big = Completion(1, text="x" * 20_000) if text == "answer" else Completion(1, text=None, error="x" * 20_000)
        ledger.add([Completion(0, text="before"), big, Completion(2, text="after")])
        ledger.commit()
        found = list(ledger.completions())
    assert [one.text for one in found] == ["before", None, "after"]
    assert found[1].error is not None and "0.02" in found[1].error and "at most 0.009" in found[1].error
    assert (big.finish_reason, big.error) == ("error", found[1].error)  # as the run counts it


@pytest.mark.parametrize(
    ("code", "is_damage"),
    [("CORRUPT", True), ("NOTADB", True), ("ERROR", True), ("TOOBIG", False), ("NOMEM", False), ("INTERRUPT", False)]
    + [(name, False) for name in ("MISUSE", "RANGE", "AUTH", "LOCKED", "PROTOCOL", "NOLFS", "FULL", "IOERR")],
)
def test_only_what_sqlite_says_of_a_damaged_file_is_damage(tmp_path: Path, code: str, is_damage: bool) -> None:
    error = sqlite3.DatabaseError("said")
    error.sqlite_errorcode = getattr(sqlite3, f"SQLITE_{code}")
    with pytest.raises(LedgerError, match="move it away" if is_damage else "what was committed before is safe"):
        with faults_named(tmp_path / "ledger.sqlite"):
            raise error


def test_no_message_repeats_a_value_of_a_megabyte(tmp_path: Path) -> None:
    long = "x" * 10**6
    said = [LLMError(long), DatasetError(f"{long} is wrong"), failed(0, long).error]
    with pytest.raises(LLMConfigError) as caught:
        compose([f"sampling.max_tokens={long[: 10**4]}"])  # Hydra's parser would take many seconds for a megabyte
    with pytest.raises(LLMConfigError) as other:
        DatasetConfig(limit=long)
    dataset = write_rows(
        tmp_path / "d.jsonl",
        iter(
            [{"messages": [{"role": long, "content": "hi"}]}, {"prompt": "hi", "sampling": {long: 1}}, {"prompt": "hi"}]
        ),
    )
    run(compose(["backend=echo", f"dataset.path={dataset}"]), tmp_path / "run")
    errors = [json.loads(line)["reason"] for line in (tmp_path / "run" / "errors.jsonl").open()]
    assert len(errors) == 2
    for text in map(str, [*said, caught.value, other.value, *errors]):
        assert len(text) < 5000, text[:100]


@pytest.mark.parametrize("option", ["prompt.tools", "backend.chat_template"])
def test_a_file_of_tools_or_a_template_that_is_too_large_is_refused(tmp_path: Path, option: str) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(10**11)
    dataset = write_rows(tmp_path / "d.jsonl", iter([{"prompt": "hi"}]))
    backend = "backend=llama_cpp" if option.startswith("backend") else "backend=echo"
    with pytest.raises(LLMConfigError, match="the file is larger than 16 MB"):
        config = compose([backend, f"dataset.path={dataset}", f"{option}={tmp_path / 'large'}"])
        read_template(str(tmp_path / "large")) if option.startswith("backend") else run(config, tmp_path / "run")

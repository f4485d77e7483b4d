"""Rows and completions → files: own columns come out as they went in, in order, whole or not at all."""

from __future__ import annotations

import datetime as dt
import io
import json
import math
import uuid
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import llmpipe
from llmpipe.config import DatasetConfig, OutputConfig
from llmpipe.datasets import Dataset
from llmpipe.exceptions import DatasetError, LedgerError, LLMError
from llmpipe.outputs import (
    COLUMNS,
    METRICS_FILE,
    WRITERS,
    Answered,
    ColumnTypes,
    Layout,
    column_types,
    found_files,
    join,
    new_files,
    output_files,
    read_run,
    seal,
    write_answers,
    write_metrics,
)
from llmpipe.outputs.parquet import ParquetWriter
from llmpipe.records import Completion, Row, failed

PLAIN = Layout("", "id", adds_id=True, sample=False, truncated=False, scorers=())


def write(directory: Path, *files: Path, format: str = "jsonl", layout: Layout = PLAIN, read_as: str = "auto") -> Path:
    """Answer each row of some files with `answer N`, rows that cannot be read with an error, and write the outputs."""
    dataset = Dataset(DatasetConfig(path=[str(file) for file in files], format=read_as))

    def answered() -> Iterator[Answered]:
        for row in dataset.rows():
            good = Completion(row.index, 0, f"answer {row.index}", "stop", 1, 0, 0, 2, 0.0, 0.1, 0.2)
            yield Answered(row, failed(row.index, row.error) if row.error else good)

    directory.mkdir(exist_ok=True)
    config = OutputConfig(format)
    types = column_types(config)
    for row in dataset.rows() if types else ():
        types.add(row)
    with new_files(directory, output_files(config)) as files:
        write_answers(files, config, layout, types, answered())
        write_metrics(files, {"output": f"outputs.{format}"})
    return directory / f"outputs.{format}"


def own_id(layout: Layout = PLAIN) -> Layout:
    return Layout(**{**vars_of(layout), "adds_id": False})


def vars_of(layout: Layout) -> dict[str, Any]:
    return {name: getattr(layout, name) for name in layout.__dataclass_fields__}


def types_of(path: Path) -> dict[str, str]:
    return {field.name: str(field.type) for field in pq.read_schema(path)}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def without_nulls(value: Any) -> Any:
    """Return a JSON value as Parquet gives it back: a struct has each field, null where the object had none."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


# --- JSONL ------------------------------------------------------------------------------------------------------------

ODD_ROWS = [
    b'{"prompt":"a","x":  [1,  2] , "prompt":"b"}',
    b'{ "prompt" : "\\u00e9\\ud800", "x": 1.10, "y": 1E+2, "z": -0.0 }',
    b'{"x": 123456789012345678901234567890, "y": NaN, "z": -Infinity}',
    '{"x": "\u2028\u2029\x85é😀"}'.encode(),
    b'{"x": "\\u0000\\/"}',
    b"{}",
    b'{"x": ' + b"[" * 199 + b"]" * 199 + b"}",
]


def test_jsonl_rows_come_out_byte_for_byte_with_the_new_columns_at_the_end(
    tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    out = write(tmp_path / "run", write_jsonl(*ODD_ROWS))
    lines = out.read_bytes().split(b"\n")
    assert len(lines) == len(ODD_ROWS) + 1 and lines[-1] == b""
    for i, (row, line) in enumerate(zip(ODD_ROWS, lines, strict=False)):
        own = row.removesuffix(b"}")
        assert line.startswith(own)
        added = json.loads(b"{" + line[len(own) :].removeprefix(b","))
        assert list(added) == ["id", *COLUMNS]
        assert (added["id"], added["completion"], added["error"]) == (f"row-{i}", f"answer {i}", None)


def test_an_unreadable_row_has_id_and_error_only(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    out = write(tmp_path / "run", write_jsonl({"prompt": "a"}, b"{bad \xff", {"prompt": "b"}))
    first, bad, last = lines_of(out)
    assert {name for name, value in bad.items() if value is not None} == {"id", "finish_reason", "error"}
    assert (bad["id"], bad["finish_reason"]) == ("row-1", "error")
    assert (first["prompt"], last["prompt"], last["completion"]) == ("a", "b", "answer 2")


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_rows_without_an_id_are_given_one_where_others_have_theirs(
    tmp_path: Path, write_jsonl: Callable[..., Path], format: str
) -> None:
    path = write_jsonl({"id": "own", "p": 1}, {"p": 2}, {"id": None, "p": 3}, b"{bad", {"id": 7, "p": 4})
    write(tmp_path / "run", path, format=format, layout=own_id())
    rows = read_run(tmp_path / "run").rows
    assert list(map(str, rows["id"])) == ["own", "row-1", "row-2", "row-3", "7"]
    assert rows["p"].dropna().tolist() == [1, 2, 3, 4]


def test_an_id_with_a_lone_surrogate_is_written_as_an_escape(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl(b'{"key": "\\ud800", "p": 1}')
    out = write(tmp_path / "run", path, layout=Layout(**{**vars_of(PLAIN), "id_column": "key"}))
    assert b'"id":"\\ud800"' in out.read_bytes()
    out.read_bytes().decode("utf-8")


@pytest.mark.parametrize("key", ["id", "key"])
def test_half_of_a_surrogate_pair_is_spelt_out_in_parquet(
    tmp_path: Path, write_jsonl: Callable[..., Path], key: str
) -> None:
    rows = [Row("f", i + 1, {key: name, "prompt": "x"}, index=i) for i, name in enumerate(["\ud800", "é"])]
    layout = Layout(**{**vars_of(PLAIN), "id_column": key, "adds_id": key != "id"})
    types = ColumnTypes()
    for row in rows:
        types.add(row)
    writer = ParquetWriter(file := io.BytesIO(), layout, types)
    for row in rows:
        writer.write(Answered(row, Completion(row.index, text="é\udfff")))
    writer.finish()
    found = pq.read_table(file)
    assert found["id"].to_pylist() == ["\\ud800", "é"]
    assert found["completion"].to_pylist() == ["é\\udfff"] * 2


def test_csv_cells_stay_text_in_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,zip\n"a\r\n""b""",01234\nc,\n')
    found = lines_of(write(tmp_path / "run", path))
    assert [(row["prompt"], row["zip"]) for row in found] == [('a\r\n"b"', "01234"), ("c", None)]


def test_parquet_values_without_a_json_form_become_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    when = dt.datetime(2024, 2, 29, 1, 2, 3, 456789)
    columns = {
        "when": pa.array([when], pa.timestamp("us")),
        "ns": pa.array([1709168523456789012], pa.timestamp("ns")),
        "day": pa.array([when.date()]),
        "money": pa.array([Decimal("12.30")]),
        "bytes": pa.array([b"\xff\x00"]),
        "kind": pa.array(["é"]).dictionary_encode(),
        "nan": pa.array([math.nan]),
        "big": pa.array([2**64 - 1], pa.uint64()),
        "nested": pa.array([[{"at": when.date(), "x": None}]]),
        "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)], pa.binary(16))),
    }
    pq.write_table(pa.table({"prompt": ["p"], **columns}), path)
    (row,) = lines_of(write(tmp_path / "run", path))
    assert math.isnan(row["nan"])
    assert {name: row[name] for name in columns if name != "nan"} == {
        "when": "2024-02-29T01:02:03.456789",
        "ns": "2024-02-29T01:02:03.456789012",
        "day": "2024-02-29",
        "money": "12.30",
        "bytes": "/wA=",
        "kind": "é",
        "big": 2**64 - 1,
        "nested": [{"at": "2024-02-29", "x": None}],
        "uuid": str(uuid.UUID(int=0)),
    }


# --- Parquet ----------------------------------------------------------------------------------------------------------


def test_parquet_columns_keep_their_arrow_types_and_values(tmp_path: Path) -> None:
    count = 3000  # several read batches
    columns = {
        "prompt": pa.array([f"p{i}" for i in range(count)], pa.large_string()),
        "ns": pa.array(range(1, count + 1), pa.timestamp("ns", "Europe/Berlin")),
        "money": pa.array([Decimal(f"{i}.25") for i in range(count)], pa.decimal128(20, 2)),
        "kind": pa.array([f"k{i % 7}" for i in range(count)]).dictionary_encode(),
        "small": pa.array([i % 100 for i in range(count)], pa.uint8()),
        "half": pa.array([0.5] * count, pa.float16()),
        "map": pa.array([[("a", i)] for i in range(count)], pa.map_(pa.string(), pa.int32())),
        "nested": pa.array([[{"x": i, "y": [b"z"]}] for i in range(count)]),
        "list": pa.array([[i, i] for i in range(count)], pa.list_(pa.float32(), 2)),
        "span": pa.array(range(count), pa.duration("ns")),
        "nothing": pa.array([None] * count, pa.int8()),
        "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)] * count, pa.binary(16))),
        "far": pa.array([6 * 10**17] * count, pa.timestamp("us")),
    }
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    found = pq.read_table(write(tmp_path / "run", tmp_path / "a.parquet", format="parquet"))
    assert found.column_names == [*columns, "id", *COLUMNS]
    assert {name: found[name].type for name in columns} == {name: column.type for name, column in columns.items()}
    assert found.select(list(columns)).equals(table)
    assert found["completion"].to_pylist() == [f"answer {i}" for i in range(count)]


def test_parquet_files_whose_types_differ_are_joined_without_losing_a_value(tmp_path: Path) -> None:
    first = {
        "prompt": ["a"],
        "widened": pa.array([1], pa.int32()),
        "was_null": pa.nulls(1),
        "text": pa.array(["x"], pa.string()),
        "category": pa.array(["x"]).dictionary_encode(),
        "mixed": pa.array([2**53 + 1]),
        "signs": pa.array([2**64 - 1], pa.uint64()),
        "only_first": pa.array([dt.date(2024, 1, 1)]),
    }
    second = {
        "prompt": ["b"],
        "widened": pa.array([2**40]),
        "was_null": pa.array([0.5]),
        "text": pa.array(["y"], pa.large_string()),
        "category": pa.array(["y"], pa.string()),
        "mixed": pa.array([0.5]),
        "signs": pa.array([-1]),
    }
    files = []
    for name, columns in (("1.parquet", first), ("2.parquet", second)):
        pq.write_table(pa.table(columns), tmp_path / name)
        files.append(tmp_path / name)
    write(tmp_path / "run", *files, format="parquet")
    rows = read_run(tmp_path / "run").rows
    assert rows["widened"].tolist() == [1, 2**40]
    assert rows["text"].tolist() == rows["category"].tolist() == ["x", "y"]
    assert rows["was_null"].tolist()[1] == 0.5
    assert rows["mixed"].tolist() == [2**53 + 1, 0.5]
    assert rows["signs"].tolist() == [2**64 - 1, -1]
    assert rows["only_first"].tolist() == [dt.date(2024, 1, 1), None]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_files_of_several_types_make_one_output(tmp_path: Path, write_jsonl: Callable[..., Path], format: str) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "n": pa.array([1], pa.int32()), "own": [0.5]}), tmp_path / "a.parquet")
    text = write_jsonl({"prompt": "b", "n": 2, "text": "x"})
    write(tmp_path / "run", tmp_path / "a.parquet", text, format=format)
    rows = read_run(tmp_path / "run").rows
    assert (rows["prompt"].tolist(), rows["n"].tolist()) == (["a", "b"], [1, 2])
    assert (rows["own"].tolist()[0], rows["text"].tolist()[1]) == (0.5, "x")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, None, 2**62], "int64"),
        ([1, 2.5], "double"),
        ([2**53, 0.5], "double"),
        ([True, None], "bool"),
        (["a", "b"], "string"),
        ([None, None], "string"),
        ([[1], [], [2.5]], "list<item: double>"),
        ([{"a": 1, "b": None}, {"a": None, "b": ["x"]}], "struct<a: int64, b: list<item: string>>"),
        ([[], None], "list<item: null>"),
        ([math.nan, 1.0], "double"),
        ([2**53 + 1, 0.5], "JSON"),
        ([2**63], "JSON"),
        ([1, "a"], "JSON"),
        ([True, 1], "JSON"),
        ([[1], 1], "JSON"),
        ([{}], "JSON"),
        ([{"a": {}}], "JSON"),
        ([["\ud800"]], "JSON"),
        ([{"\ud800": 1}], "JSON"),
        ([{"a": [2**53 + 1]}, {"a": [0.5]}], "JSON"),
        ([{f"k{i}": 1} for i in range(1300)], "JSON"),
        ([{f"k{i}": 1 for i in range(1300)}], "JSON"),
        ([json.loads("[" * 50 + "]" * 50)], "JSON"),
    ],
)
def test_columns_of_text_rows_are_typed_or_kept_as_json_text_if_no_type_holds_them_exactly(
    values: list[Any], kind: str
) -> None:
    for ordered in (values, values[::-1]):  # what is read first decides nothing
        types = ColumnTypes()
        for i, value in enumerate(ordered):
            types.add(Row("f", i, {"x": value}))
        field = types.schema().field("x")
        assert ("JSON" if field.metadata else str(field.type)) == kind


def test_numbers_that_turn_out_to_be_floats_late_are_still_numbers(
    tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    rows = [{"x": i, "y": [i]} for i in range(9000)] + [{"x": 0.5, "y": [0.5]}]
    out = write(tmp_path / "run", write_jsonl(*rows), format="parquet")
    assert (types_of(out)["x"], types_of(out)["y"]) == ("double", "list<element: double>")
    assert pd.read_parquet(out)["x"].tolist()[-2:] == [8999.0, 0.5]


def test_added_columns_have_their_types_even_where_all_is_null(
    tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    layout = Layout("llm_", "id", True, True, True, ("exact_match",))
    out = write(tmp_path / "run", write_jsonl(b"{bad"), format="parquet", layout=layout)
    kinds = {"string": "string", "int64": "int64", "float64": "double"}
    assert types_of(out) == {
        "llm_id": "string",
        "llm_sample": "int64",
        **{f"llm_{name}": kinds[kind] for name, kind in COLUMNS.items()},
        "llm_truncated_prompt_tokens": "int64",
        "llm_score_exact_match": "double",
    }


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_an_empty_parquet_file_gives_an_empty_output(tmp_path: Path, format: str) -> None:
    none = pa.array([], pa.string())
    pq.write_table(pa.table({"prompt": none, "id": none}), tmp_path / "a.parquet")
    write(tmp_path / "run", tmp_path / "a.parquet", format=format, layout=own_id())
    assert len(read_run(tmp_path / "run").rows) == 0


# --- any JSON at all --------------------------------------------------------------------------------------------------

# Lone surrogates only as values: a column's name cannot hold one, and such a row is an error row.
TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
ANY_TEXT = st.text(max_size=8)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-5, 5),
    st.sampled_from([2**53, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 10**40]),
    st.floats(allow_nan=False),
    ANY_TEXT,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(TEXT, ANY_TEXT), inner, max_size=3),
    ),
    max_leaves=6,
)
# Few names and few kinds per column, so that columns are often of one type and sometimes of two.
OBJECTS = st.dictionaries(
    st.one_of(st.sampled_from(["a", "b", "c"]), TEXT.filter(lambda name: name not in {"id", *COLUMNS})),
    st.one_of(VALUES, st.integers(), st.lists(st.integers()), st.fixed_dictionaries({}, optional={"k": VALUES})),
    max_size=4,
)
quick = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@quick
@given(st.lists(OBJECTS, min_size=1, max_size=5), st.booleans())
def test_any_json_object_survives_jsonl_and_parquet(
    tmp_path_factory: pytest.TempPathFactory, objects: list[dict[str, Any]], ascii: bool
) -> None:
    directory = tmp_path_factory.mktemp("any")
    try:
        lines = [json.dumps(one, ensure_ascii=ascii).encode() for one in objects]
    except UnicodeEncodeError:
        lines = [json.dumps(one).encode() for one in objects]
    path = directory / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    out = write(directory / "j", path)
    for line, own in zip(out.read_bytes().split(b"\n"), lines, strict=False):
        assert line.startswith(own[:-1])
    assert [{name: row[name] for name in one} for row, one in zip(lines_of(out), objects, strict=True)] == [
        json.loads(line) for line in lines
    ]
    table = pq.read_table(write(directory / "p", path, format="parquet"))
    for field in table.schema:
        if field.name in COLUMNS or field.name == "id":
            continue
        as_json = b"llmpipe" in (field.metadata or {})
        found = [json.loads(cell) if as_json and cell is not None else cell for cell in table[field.name].to_pylist()]
        assert without_nulls(found) == without_nulls([one.get(field.name) for one in objects])
    assert {name for one in objects for name in one} <= set(table.column_names)


ODD_LINES = [b'{"prompt": "p"}', b"", b" \t", b"\xef\xbb\xbf", b'{"a":"\xed\xa0\x80"}', b'{"a":1}\r', b"[]", b"NaN"]


PACKED = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"
"""What files of gzip and of zstd begin with: their bytes are no lines."""
LINES = st.lists(st.one_of(st.binary(max_size=20), st.sampled_from(ODD_LINES)), max_size=6).filter(
    lambda lines: not b"\n".join(lines).startswith(PACKED)
)


@quick
@given(LINES)
@example([b"{", b"{"])
@example([b"{", b"\0"])
@example([b"{", b"}"])
def test_any_bytes_give_one_output_row_per_line_that_is_not_blank(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    _one_output_row_per_line(tmp_path_factory.mktemp("bytes"), lines, read_as="jsonl")


@quick
@given(st.sampled_from([line for line in ODD_LINES if line.strip(b" \t\xef\xbb\xbf")]), LINES)
def test_a_first_line_that_is_whole_makes_any_bytes_rows_by_line(
    tmp_path_factory: pytest.TempPathFactory, first: bytes, lines: list[bytes]
) -> None:
    _one_output_row_per_line(tmp_path_factory.mktemp("bytes"), [first, *lines], read_as="auto")


def _one_output_row_per_line(directory: Path, lines: list[bytes], read_as: str) -> None:
    path = directory / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    expected = sum(1 for line in text.split(b"\n") if line.strip(b" \t\r"))
    assert len(lines_of(write(directory / "j", path, read_as=read_as))) == expected
    table = pq.read_table(write(directory / "p", path, format="parquet", read_as=read_as))
    assert table.num_rows == expected
    errors = lines_of(directory / "j" / "errors.jsonl")
    assert len(errors) == sum(row["error"] is not None for row in lines_of(directory / "j" / "outputs.jsonl"))


# --- the layout -------------------------------------------------------------------------------------------------------


def test_a_column_that_is_taken_is_refused_with_the_remedy() -> None:
    with pytest.raises(DatasetError, match="'completion', 'error' that llmpipe would add: set output.prefix="):
        PLAIN.check(["prompt", "error", "completion"])
    Layout(**{**vars_of(PLAIN), "prefix": "llm_"}).check(["prompt", "error", "completion"])
    with pytest.raises(DatasetError, match="'llm_error'"):
        Layout(**{**vars_of(PLAIN), "prefix": "llm_"}).check(["llm_error"])


def test_values_and_names_of_a_layout_match() -> None:
    layout = Layout("p_", "id", True, True, True, ("exact_match", "contains"))
    completion = Completion(0, 3, "t", "stop", 1, 2, 4, 5, 0.1, 0.2, 0.3, None, {"contains": 1.0})
    values = dict(zip(layout.types(), layout.values(Row("f", 1, index=0), completion), strict=True))
    assert values == {
        "p_id": "row-0",
        "p_sample": 3,
        "p_completion": "t",
        "p_finish_reason": "stop",
        "p_prompt_tokens": 1,
        "p_cached_prompt_tokens": 2,
        "p_completion_tokens": 5,
        "p_queue_s": 0.1,
        "p_first_token_s": 0.2,
        "p_latency_s": 0.3,
        "p_error": None,
        "p_truncated_prompt_tokens": 4,
        "p_score_exact_match": None,
        "p_score_contains": 1.0,
    }


def test_rows_and_completions_are_joined_in_order_and_a_gap_is_an_error() -> None:
    rows = [Row("f", i + 1, index=i) for i in range(2)]
    found = join(rows, [Completion(0, 0), Completion(0, 1), Completion(1, 0)])
    assert [(one.row.index, one.completion.sample) for one in found] == [(0, 0), (0, 1), (1, 0)]
    for completions in ([Completion(0)], [Completion(1)], []):
        with pytest.raises(LLMError, match="has no answer in the ledger; resume the run"):
            list(join(rows, completions))


# --- files ------------------------------------------------------------------------------------------------------------


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_files_appear_together_and_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"before")
    for error, expected in ((RuntimeError(), RuntimeError), (OSError(28, "No space left on device"), LLMError)):
        with pytest.raises(expected) as caught, new_files(tmp_path, ["a", "b"]) as files:
            files["a"].write(b"half")
            raise error
        assert content(tmp_path) == {"a": b"before"}
    assert str(caught.value) == f"cannot write to {tmp_path}: No space left on device"
    (tmp_path / ".b.tmp").write_bytes(b"of a run that was killed")
    with new_files(tmp_path, ["a", "b"]) as files:
        files["a"].write(b"after")
        digests = seal(files)
        assert (tmp_path / "a").read_bytes() == b"before" and not (tmp_path / "b").exists()
    assert content(tmp_path) == {"a": b"after", "b": b""}
    assert found_files(tmp_path, ["c"], {name: [digest] for name, digest in digests.items()}) == digests


def test_a_directory_that_turns_read_only_is_named_although_nothing_can_be_removed_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    with pytest.raises(LLMError, match="cannot write to .*: Read-only file system"), new_files(tmp_path, ["a"]):
        monkeypatch.setattr(Path, "unlink", refuse)
        monkeypatch.setattr("os.replace", refuse)


def test_nothing_is_written_through_a_link_that_lies_in_the_way(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".a.tmp").symlink_to(outside)
    with new_files(tmp_path / "run", ["a"]) as files:
        files["a"].write(b"answers")
    assert (outside.read_bytes(), content(tmp_path / "run")) == (b"mine", {"a": b"answers"})


def test_files_of_another_origin_and_changed_ones_are_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    known = {"a": ["0" * 64]}
    with pytest.raises(LedgerError, match="a is not of this run; move it away, or choose another hydra.run.dir"):
        found_files(tmp_path, ["a"], {})
    with pytest.raises(LedgerError, match="a was changed since the run; move it away to have it written again"):
        found_files(tmp_path, [], known)
    (tmp_path / "a").unlink()
    assert found_files(tmp_path, ["a"], known) == {}
    (tmp_path / "a").mkdir()
    with pytest.raises(LLMError, match="cannot read .*a: Is a directory"):
        found_files(tmp_path, ["a"], known)


def test_a_writer_that_fails_leaves_no_file(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    (tmp_path / "run").mkdir()
    rows = Dataset(DatasetConfig(path=str(write_jsonl({"prompt": "a"})))).rows

    def answered() -> Iterator[Answered]:
        yield Answered(next(rows()), Completion(0, text="x"))
        raise LLMError("the ledger is damaged")

    for kind in WRITERS:
        config = OutputConfig(kind)
        with (
            pytest.raises(LLMError, match="the ledger is damaged"),
            new_files(tmp_path / "run", output_files(config)) as f,
        ):
            write_answers(f, config, PLAIN, column_types(config), answered())
        assert list((tmp_path / "run").iterdir()) == []


def test_errors_name_id_file_line_reason_and_the_row_as_it_stands(
    tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl({"prompt": "a"}, b'{"bad": "\xff')
    write(tmp_path / "run", path)
    (found,) = lines_of(tmp_path / "run" / "errors.jsonl")
    reason = found.pop("reason")
    assert "utf-8" in reason
    assert found == {"id": "row-1", "sample": 0, "file": str(path), "line": 2, "raw": '{"bad": "\\xff'}


def test_a_directory_without_a_finished_run_is_refused_naming_what_lacks(
    tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    with pytest.raises(LLMError, match=f"holds no finished run: there is no {METRICS_FILE}"):
        llmpipe.read_run(tmp_path)
    write(tmp_path, write_jsonl({"prompt": "a"})).unlink()
    with pytest.raises(LLMError, match=r"there is no outputs\.jsonl"):
        llmpipe.read_run(tmp_path)


def test_where_a_row_stands_can_be_written_beside_it_and_a_clash_is_refused(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Callable[..., llmpipe.RunConfig]
) -> None:
    path = write_jsonl(b"", {"prompt": "a"}, b"{bad")
    for format in ("jsonl", "parquet"):
        llmpipe.run(echo_config(path, "output.source=true", f"output={format}"), tmp_path / format)
        rows = llmpipe.read_run(tmp_path / format).rows
        assert rows["source_file"].tolist() == [str(path)] * 2 and rows["source_line"].tolist() == [2, 3]
    taken = echo_config(write_jsonl({"prompt": "a", "source_line": 5}, name="taken.jsonl"), "output.source=true")
    with pytest.raises(llmpipe.DatasetError, match=r"'source_line' that llmpipe would add: set output\.prefix="):
        llmpipe.run(taken, tmp_path / "taken")

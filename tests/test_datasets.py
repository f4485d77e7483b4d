"""Files → rows: what a file may hold, what is refused before work starts, and that nothing is held in memory."""

from __future__ import annotations

import gzip
import json
import math
import os
import sys
import tracemalloc
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import llmpipe
from llmpipe.cells import MAX_LEVELS
from llmpipe.config import ColumnsConfig, DatasetConfig
from llmpipe.datasets import Dataset
from llmpipe.exceptions import DatasetError, MissingDependencyError
from llmpipe.records import Row


def dataset(*paths: Path | str, limit: int | None = None, **columns: str | None) -> Dataset:
    names = [str(path) for path in paths]
    return Dataset(DatasetConfig(path=names, columns=ColumnsConfig(**columns), limit=limit))


def read(*paths: Path | str, **options: Any) -> list[Row]:
    return list(dataset(*paths, **options).rows())


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


# --- JSONL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{bad", "not valid JSON"),
        (b'{"prompt": "x"', "not valid JSON"),
        (b'{"prompt": "x"} {"prompt": "y"}', "not valid JSON"),
        (b'{"prompt": "caf\xe9"}', "utf-8"),
        (b"[1, 2]", "a JSON list, not an object"),
        (b'"text"', "a JSON str, not an object"),
        (b"null", "not an object"),
        (b'{"\\ud800": 1}', "lone surrogate"),
        (
            b'{"prompt": "x", "deep": ' + b"[" * (MAX_LEVELS + 1) + b"]" * (MAX_LEVELS + 1) + b"}",
            f"{MAX_LEVELS} levels",
        ),
        (b'{"prompt": "x", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON"),
        (b'{"prompt": "x", "huge": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"\x00\x01\x02", "not valid JSON"),
    ],
)
def test_a_bad_line_is_an_error_row_with_its_line_number_between_unchanged_neighbours(
    write_jsonl: Callable[..., Path], line: bytes, reason: str
) -> None:
    rows = read(write_jsonl({"prompt": "a"}, line, {"prompt": "b"}))
    assert [row.line for row in rows] == [1, 2, 3]
    assert reason in (rows[1].error or "")
    assert (rows[1].raw, rows[1].values) == (line, {})
    assert [rows[0].values, rows[2].values] == [{"prompt": "a"}, {"prompt": "b"}]
    assert rows[0].error is rows[2].error is None


def test_blank_lines_are_skipped_and_counted_in_line_numbers_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"prompt": "a"}\n \t\r\n\r\n{"prompt": "b"}')
    assert [(row.index, row.line, row.values["prompt"]) for row in read(path)] == [(0, 2, "a"), (1, 5, "b")]


def test_bom_and_crlf_are_no_part_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert [row.raw for row in read(path)] == [b'{"prompt": "a"}', b'{"prompt": "b"}']


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_line_feeds_end_a_line(write_jsonl: Callable[..., Path], character: str) -> None:
    line = json.dumps({"prompt": f"a{character}b"}, ensure_ascii=False).encode()
    assert [row.values for row in read(write_jsonl(line))] == [{"prompt": f"a{character}b"}]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12345678901234567890123", 12345678901234567890123),
        ("-9223372036854775809", -9223372036854775809),
        ("9007199254740993", 9007199254740993),
        ("Infinity", math.inf),
        ("-Infinity", -math.inf),
        ("1e400", math.inf),
        ("0.1", 0.1),
        ('"\\ud800"', "\ud800"),
        ('"\\u0000"', "\0"),
        ('"\\ud83d\\ude00"', "😀"),
    ],
)
def test_json_values_are_read_exactly(write_jsonl: Callable[..., Path], text: str, value: Any) -> None:
    (row,) = read(write_jsonl(b'{"x": ' + text.encode() + b"}"))
    assert row.values["x"] == value
    assert type(row.values["x"]) is type(value)


def test_brackets_inside_text_are_no_nesting(write_jsonl: Callable[..., Path]) -> None:
    (row,) = read(write_jsonl({"prompt": "[" * 1000 + "{" * 1000}))
    assert row.error is None


# --- CSV --------------------------------------------------------------------------------------------------------------


def test_csv_cells_are_text_and_empty_ones_are_null(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfid,prompt,note\r\n007,"two\r\nlines, ""quoted""",\r\n\r\n8,\xe2\x80\xa8,NaN\r\n')
    rows = read(path)
    assert [row.values for row in rows] == [
        {"id": "007", "prompt": 'two\r\nlines, "quoted"', "note": None},
        {"id": "8", "prompt": "\u2028", "note": "NaN"},
    ]
    assert [row.line for row in rows] == [2, 5]


def test_a_bad_csv_row_is_an_error_row_as_it_stands_between_unchanged_neighbours(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,prompt\n1,a\n2,b,"c, d"\n3,caf\xe9\n4,"x"y\n5,nul\x00\n6,"open\n')
    rows = read(path)
    assert [(row.line, row.raw) for row in rows if row.error] == [
        (3, b'2,b,"c, d"'),
        (4, b"3,caf\xe9"),
        (5, b'4,"x"y'),
        (7, b'6,"open'),
    ]
    assert [row.error.split(":")[0] for row in rows if row.error] == [
        "3 cells, and the header has 2",
        "the column 'prompt' is not valid UTF-8",
        "not valid CSV",
        "not valid CSV",
    ]
    assert [row.values["prompt"] for row in rows if not row.error] == ["a", "nul\0"]


@pytest.mark.parametrize("header", [b"id,prompt,id", b"id,pr\xe9mpt,prompt"])
def test_a_csv_header_that_no_row_can_use_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(header + b"\n1,2,3\n")
    with pytest.raises(DatasetError, match=r"a\.csv.*header"):
        dataset(path).scan()


# --- Parquet ----------------------------------------------------------------------------------------------------------


def test_parquet_values_that_python_cannot_hold_are_read_as_text(tmp_path: Path) -> None:
    column = pa.array([6 * 10**17, 0], pa.timestamp("us"))
    rows = read(write_parquet(tmp_path / "a.parquet", {"prompt": ["a", "b"], "when": column}))
    assert rows[0].values["when"].startswith("20983-")


@pytest.mark.parametrize("cut", [0.5, 0.99])
def test_a_truncated_parquet_file_is_refused_by_name(tmp_path: Path, cut: float) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"prompt": [str(i) for i in range(1000)]})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * cut)])
    with pytest.raises(DatasetError, match=r"a\.parquet is not a readable Parquet file"):
        dataset(path).scan()


def test_parquet_with_damaged_pages_is_refused_by_name(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"prompt": [f"prompt {i}" for i in range(1000)]})
    data = bytearray(path.read_bytes())
    data[4 : len(data) // 2] = b"\xff" * (len(data) // 2 - 4)
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"a\.parquet cannot be read to its end"):
        dataset(path).scan()


@pytest.mark.parametrize(
    ("columns", "column", "must"),
    [
        ({"prompt": [1, 2]}, "prompt", "text"),
        ({"prompt": [b"a"]}, "prompt", "text"),
        ({"prompt": [["a"]]}, "prompt", "text"),
        ({"messages": [1.5]}, "messages", "lists or JSON text"),
        ({"prompt": ["a"], "id": [[1]]}, "id", "text, numbers, dates or UUIDs"),
        ({"prompt": ["a"], "id": [{"a": 1}]}, "id", "text, numbers, dates or UUIDs"),
        ({"prompt": ["a"], "sampling": [3]}, "sampling", "structs or JSON text"),
    ],
)
def test_a_parquet_column_of_the_wrong_type_is_refused_naming_file_and_columns(
    tmp_path: Path, columns: dict[str, Any], column: str, must: str
) -> None:
    path = write_parquet(tmp_path / "a.parquet", {**columns, "other": [True] * len(columns[column])})
    with pytest.raises(DatasetError) as caught:
        dataset(path).scan()
    for part in (str(path), repr(column), f"must be {must}", f"dataset.columns.{column}=", "other (bool)"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "prompts",
    [
        pa.array(["a"], pa.string()),
        pa.array(["a"], pa.large_string()),
        pa.array(["a"], pa.string_view()),
        pa.array(["a"]).dictionary_encode(),
        pa.nulls(1),
    ],
)
def test_every_arrow_type_of_text_is_a_prompt(tmp_path: Path, prompts: Any) -> None:
    scan = dataset(write_parquet(tmp_path / "a.parquet", {"prompt": prompts})).scan()
    assert scan.rows == 1


def test_the_prompt_column_may_have_any_type_where_a_template_does_not_need_it(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"prompt": [1], "question": ["a"]})
    assert dataset(path).scan(template=["question"]).rows == 1


def test_parquet_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), path)
    with pytest.raises(DatasetError, match="names a column twice"):
        dataset(path).scan()


# --- what is refused before work starts -------------------------------------------------------------------------------


def write_as(suffix: str, path: Path, rows: list[dict[str, str]]) -> Path:
    path = path.with_suffix(suffix)
    frame = pd.DataFrame(rows)
    if suffix == ".parquet":
        frame.to_parquet(path)
    elif suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", lines=True)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_without_a_prompt_column_a_file_is_refused_naming_the_columns_there_are(tmp_path: Path, suffix: str) -> None:
    path = write_as(suffix, tmp_path / "a", [{"question": "x", "answer": "y"}])
    with pytest.raises(DatasetError) as caught:
        dataset(path).scan()
    for part in (str(path), "'prompt'", "'messages'", "question, answer", "dataset.columns.prompt="):
        assert part in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_one_file_of_several_that_lacks_the_prompt_column_is_named(tmp_path: Path, suffix: str) -> None:
    good = write_as(suffix, tmp_path / "good", [{"prompt": "x"}])
    bad = write_as(suffix, tmp_path / "bad", [{"promt": "x"}])
    with pytest.raises(DatasetError, match=rf"bad\{suffix} has neither"):
        dataset(good, bad).scan()


def test_a_column_named_in_the_config_or_template_must_be_there(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl({"prompt": "a", "answer": "b"})
    with pytest.raises(DatasetError, match="no column 'label'; it has: prompt, answer"):
        dataset(path, reference="label").scan()
    with pytest.raises(DatasetError, match="no column 'topic'; it has: prompt, answer"):
        dataset(path).scan(template=["topic"])
    assert dataset(path, reference="answer").scan(template=["answer"]).columns == ["prompt", "answer"]


@pytest.mark.parametrize("name", ["a.txt", "a", "a.parquet.gz", "a.gz", "a.xlsx"])
def test_an_unknown_file_type_is_refused_naming_those_there_are(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DatasetError, match=r"no known type; there are \.jsonl, \.ndjson, \.csv, \.parquet"):
        dataset(tmp_path / name)


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    for path, what in ((tmp_path, "is a directory without a file"), (tmp_path / "no.jsonl", "does not exist")):
        with pytest.raises(DatasetError, match=what):
            dataset(path)
    with pytest.raises(DatasetError, match="matches no file"):
        dataset(tmp_path / "*.jsonl")


@pytest.mark.parametrize(
    "path", ["s3://b/x.jsonl", "hf://datasets/o/n/*.parquet", "https://x.org/a.csv", "owner/name-1.5"]
)
def test_what_is_not_on_this_machine_is_refused_as_not_supported_yet(path: str) -> None:
    with pytest.raises(DatasetError, match="not supported yet: download it first") as caught:
        dataset(path)
    assert "not exist" not in str(caught.value)


@pytest.mark.parametrize("ids", [["a", "b", "a"], [1, 2, "1"], ["x", None, "row-1"]])
def test_duplicate_ids_are_refused_naming_both_places(write_jsonl: Callable[..., Path], ids: list[Any]) -> None:
    path = write_jsonl(*({"prompt": "p", "id": one} for one in ids))
    with pytest.raises(DatasetError, match=r"stands twice: .*rows\.jsonl line \d and .*rows\.jsonl line 3"):
        dataset(path).scan()


def test_rows_whose_ids_begin_again_in_each_file_are_named_by_position_when_asked_for(
    write_jsonl: Callable[..., Path],
) -> None:
    shards = [write_jsonl({"prompt": "p", "id": 1}, name=name) for name in ("one.jsonl", "two.jsonl")]
    with pytest.raises(DatasetError, match=r"dataset\.columns\.id=null"):
        dataset(*shards).scan()
    by_position = dataset(*shards, id=None)
    assert by_position.scan().rows == 2
    assert [row.id(by_position.columns.id) for row in by_position.rows()] == ["row-0", "row-1"]


IDS = {
    "whole": pa.array([1.0, 2.0, None]),
    "doubles": pa.array([0.5, 1.5, None]),
    "decimals": pa.array([Decimal("1.10"), Decimal("2.00"), None], pa.decimal128(5, 2)),
    "dates": pa.array([date(2024, 1, 1), date(2024, 1, 2), None]),
    "instants": pa.array([1, 2, None], pa.timestamp("ns", "Europe/Paris")),
    "uuids": pa.array([UUID(int=1).bytes, UUID(int=2).bytes, None], pa.uuid()),
    "hashes": pa.array([b"\xff" * 16, b"\xfe" * 16, None], pa.binary(16)),
    "categories": pa.array(["a", "b", None]).dictionary_encode(),
}


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("output", ["jsonl", "parquet"])
def test_ids_of_every_single_value_name_their_rows_in_input_and_output(tmp_path: Path, kind: str, output: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"id": IDS[kind], "prompt": ["x", "y", "z"]})
    ids = [row.id("id") for row in read(path)]
    assert ids[2] == "row-2" and len(set(ids)) == 3
    llmpipe.run(llmpipe.compose(["backend=echo", f"dataset.path={path}", f"output={output}"]), tmp_path / "run")
    found = llmpipe.read_run(tmp_path / "run").rows
    assert list(map(str, found["id"])) == list(map(str, ids))


def test_duplicate_ids_are_found_across_files(write_jsonl: Callable[..., Path]) -> None:
    one = write_jsonl({"prompt": "p", "id": "x"}, name="one.jsonl")
    two = write_jsonl({"prompt": "p", "id": "x"}, name="two.jsonl")
    with pytest.raises(DatasetError, match=r"one\.jsonl line 1 and .*two\.jsonl line 1"):
        dataset(one, two).scan()


def test_rows_without_an_id_are_named_by_position_bad_rows_counted(write_jsonl: Callable[..., Path]) -> None:
    rows = read(write_jsonl({"prompt": "a"}, b"{bad", {"prompt": "b", "id": None}, {"prompt": "c", "id": "own"}))
    assert [row.id("id") for row in rows] == ["row-0", "row-1", "row-2", "own"]


def test_the_digest_changes_with_the_content_only(write_jsonl: Callable[..., Path]) -> None:
    one = dataset(write_jsonl({"prompt": "a"}, name="one.jsonl")).scan().digest
    same = dataset(write_jsonl({"prompt": "a"}, name="two.jsonl")).scan().digest
    other = dataset(write_jsonl({"prompt": "b"}, name="three.jsonl")).scan().digest
    assert one == same != other


# --- several files, compression, memory -------------------------------------------------------------------------------


def test_files_and_globs_are_read_in_order_and_rows_numbered_through(write_jsonl: Callable[..., Path]) -> None:
    first = write_jsonl({"prompt": "z"}, name="z.jsonl")
    for name in ("b", "a"):
        write_jsonl({"prompt": name}, {"prompt": name + name}, name=f"part-{name}.jsonl")
    (first.parent / "part-dir.jsonl").mkdir()
    rows = read(first, first.parent / "part-*.jsonl")
    assert [row.values["prompt"] for row in rows] == ["z", "a", "aa", "b", "bb"]
    assert [(row.index, row.line) for row in rows] == [(0, 1), (1, 1), (2, 2), (3, 1), (4, 2)]
    assert rows[1].file == str(first.parent / "part-a.jsonl")


def test_limit_takes_the_first_rows_across_files_and_formats(tmp_path: Path) -> None:
    files = [write_as(suffix, tmp_path / "a", [{"prompt": "x"}, {"prompt": "y"}]) for suffix in (".parquet", ".csv")]
    assert len(read(*files, limit=3)) == 3
    assert dataset(*files, limit=3).scan().rows == 3
    assert read(*files, limit=0) == []


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_compressed_text_of_several_parts_reads_like_the_plain_file(tmp_path: Path, kind: str, suffix: str) -> None:
    plain = write_as(kind, tmp_path / "a", [{"prompt": f"row {i} é" * 50} for i in range(300)])
    text = plain.read_bytes()
    pack = zstandard.ZstdCompressor().compress if suffix == ".zst" else gzip.compress
    packed = tmp_path / f"a{kind}{suffix}"
    packed.write_bytes(pack(text[:1000]) + pack(b"") + pack(text[1000:]))
    assert [row.values for row in read(packed)] == [row.values for row in read(plain)]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_compressed_file_is_refused_by_name(tmp_path: Path, suffix: str, damage: str) -> None:
    text = b"".join(b'{"prompt": "%x"}\n' % hash((i, "x")) for i in range(1000))
    packed = zstandard.ZstdCompressor().compress(text) if suffix == ".zst" else gzip.compress(text)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed[: len(packed) // 2] if damage == "cut" else text)
    with pytest.raises(DatasetError, match=r"a\.jsonl\.\w+ cannot be read to its end"):
        dataset(path).scan()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_rows_are_streamed_so_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    text = b"".join(b'{"prompt": "%s"}\n' % os.urandom(500).hex().encode() for _ in range(20_000))
    path.write_bytes(zstandard.ZstdCompressor().compress(text) if suffix == ".zst" else gzip.compress(text, 1))
    tracemalloc.start()
    try:
        count = sum(1 for _ in dataset(path).rows())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 20_000
    assert peak < 10e6  # of 20 MB of text


def test_parquet_is_streamed_batch_by_batch(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"prompt": [f"{i:01000d}" for i in range(20_000)]})
    tracemalloc.start()
    try:
        count = sum(1 for _ in dataset(path).rows())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (count, peak < 10e6) == (20_000, True)


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("a.jsonl.zst", "zstandard", "zstd"), ("a.parquet", "pyarrow.parquet", "parquet")]
)
def test_a_package_that_is_not_installed_is_named_with_the_command_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, extra: str
) -> None:
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"reading {name} needs .*: pip install 'llmpipe\[{extra}\]'"):
        dataset(tmp_path / name).scan()

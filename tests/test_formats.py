"""Files as people have them: what a file holds decides how it is read, and every layout gives the same rows."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llmpipe
from llmpipe.config import ColumnsConfig, CsvConfig, DatasetConfig
from llmpipe.datasets import Dataset, formats
from llmpipe.datasets import json as json_reader
from llmpipe.exceptions import DatasetError, LLMConfigError
from llmpipe.records import Row

ROWS = [{"id": f"q{i}", "prompt": f"What is {i} + 2?", "deep": {"é": [1, None, ']}\\"']}} for i in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
ARRAY, PRETTY = json.dumps(ROWS), json.dumps(ROWS, indent=2, ensure_ascii=False)
ONE_BY_ONE = "\n".join(json.dumps(row, indent=1) for row in ROWS)


def dataset(path: Path | str, **options: Any) -> Dataset:
    return Dataset(DatasetConfig(path=str(path), **options))


def read(path: Path | str, **options: Any) -> list[Row]:
    return list(dataset(path, **options).rows())


def values(path: Path | str, **options: Any) -> list[dict[str, Any]]:
    rows = read(path, **options)
    assert [row.error for row in rows] == [None] * len(rows)
    return [row.values for row in rows]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- JSON in any layout -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.txt", "a"])
@pytest.mark.parametrize("text", [LINES, ARRAY, PRETTY, ONE_BY_ONE, "\n\n " + PRETTY + "\n", ARRAY + "\n"])
def test_json_of_any_layout_is_read_whatever_the_file_is_called(tmp_path: Path, name: str, text: str) -> None:
    assert values(write(tmp_path / name, text)) == ROWS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.ZstdCompressor().compress])
@pytest.mark.parametrize("text", [LINES.replace("\n", "\r\n"), PRETTY])
def test_encodings_and_packings_are_told_by_content(
    tmp_path: Path, encoding: str, pack: Callable[[bytes], bytes], text: str
) -> None:
    rows = read(write(tmp_path / "a.jsonl", pack(text.encode(encoding))))
    assert [row.values for row in rows] == ROWS
    assert [json.loads(row.raw or b"") for row in rows] == ROWS


WILD = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.sampled_from([10**30, 2**64, 1e400, 0.1])
        | st.floats(allow_nan=False)
        | st.text(max_size=6)
        | st.sampled_from(["\ud800", '"', "\\", '\\"', "{", "]", "\n", "\u2028", "\0"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab{", max_size=2), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(WILD, max_size=4),
    indent=st.sampled_from([None, 1, 3]),
    block=st.integers(1, 9) | st.integers(1, 99),
    few=st.integers(1, 9),
    array=st.booleans(),
)
def test_every_value_is_exactly_that_of_jsonl_wherever_blocks_end(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    indent: int | None,
    block: int,
    few: int,
    array: bool,
) -> None:
    path = tmp_path_factory.mktemp("wild") / "a.json"
    text = json.dumps(rows, indent=indent) if array else "\r\n".join(json.dumps(row, indent=indent) for row in rows)
    write(path, text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_reader, "_BLOCK", block)
        patch.setattr(json_reader, "_FEW", few)
        found = list(json_reader.read_json(path))
    assert [row.values for row in found] == rows
    assert [list(row.values) for row in found] == [list(row) for row in rows]
    for row in found:
        assert row.raw is not None and b"\n" not in row.raw and b"\r" not in row.raw
        assert json.loads(row.raw) == row.values


def test_rows_of_pretty_json_have_the_lines_they_begin_on_and_are_one_line_in_the_output(
    tmp_path: Path, echo_config: Callable[..., llmpipe.RunConfig]
) -> None:
    path = write(tmp_path / "a.json", '[\n  {\n    "prompt": "a b",\n    "n": 1.50\n  },\n\n  {"prompt": "c"}\n]\n')
    assert [row.line for row in read(path)] == [2, 7]
    llmpipe.run(echo_config(path), tmp_path / "run")
    first, second = (tmp_path / "run" / "outputs.jsonl").read_text().splitlines()
    assert first.startswith('{ "prompt": "a b", "n": 1.50 ,"id":"row-0"') and json.loads(second)["completion"] == "c"


def test_an_item_that_is_no_row_is_an_error_row_between_unchanged_neighbours(tmp_path: Path) -> None:
    items = ['{"prompt": "a"}', "5", '{"prompt": nul}', '"text, ]"', "[1, {}]", '{"prompt": "\xe9"}', '{"prompt": "b"}']
    text = "[\n" + ",\n".join(items) + "\n]"
    rows = read(write(tmp_path / "a.json", text.encode("latin-1")))
    assert [row.line for row in rows] == list(range(2, 9))
    reasons = ["", "a JSON int", "not valid JSON at column", "a JSON str", "a JSON list", "utf-8", ""]
    assert all(reason in (row.error or "") for row, reason in zip(rows, reasons, strict=True))
    assert [row.values for row in rows if not row.error] == [{"prompt": "a"}, {"prompt": "b"}]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PRETTY[:-40], r"line \d+: the value that begins there has no end"),
        (PRETTY[:-1], r"line \d+: ',' is missing at the end"),
        ('[\n{"prompt": "a"}\n{"prompt": "b"}\n]', "line 3: ',' is missing before '{'"),
        ('[\n{"prompt": "a},\n{"prompt": "b"}\n]', "line 2: a quote is never closed"),
        ("{\n\0\n}", "line 2: Expecting value where a key should stand"),
    ],
)
def test_json_whose_rows_cannot_be_told_apart_is_refused_with_file_and_line(
    tmp_path: Path, text: str, reason: str
) -> None:
    with pytest.raises(DatasetError, match=rf"a\.json cannot be read to its end: {reason}"):
        read(write(tmp_path / "a.json", text))


@pytest.mark.parametrize(
    "bad",
    [
        '{"prompt": "x"',
        "{bad",
        '{"prompt": "x',
        "[1, 2]",
        "[[[",
        '{"a": {',
        "5",
        "{" * 9999,
        "{",
        "[",
        "[{",
        '{"a": 1,',
    ],
)
def test_a_damaged_first_line_does_not_make_jsonl_anything_else(tmp_path: Path, bad: str) -> None:
    rows = read(write(tmp_path / "a.jsonl", bad + "\n" + LINES))
    assert [row.values for row in rows[1:]] == ROWS
    assert rows[0].error


def test_of_an_array_of_any_length_one_row_is_held(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("w") as file:
        file.write('{"meta": {"of": [{"n": 1}, "' + "x" * 10**6 + '"]}, "data": [')
        file.write(",".join(json.dumps({"prompt": "y" * 900}) for _ in range(20_000)) + "]}")
    tracemalloc.start()
    try:
        count = sum(1 for _ in dataset(path, field="data").rows())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (count, peak < 8e6) == (20_000, True)


# --- a list inside an object ------------------------------------------------------------------------------------------


def test_the_only_list_of_rows_in_an_object_is_found(tmp_path: Path) -> None:
    for number, indent in enumerate([None, 2]):
        text = json.dumps({"version": 1, "tags": ["a"], "data": {"rows": ROWS, "none": []}}, indent=indent)
        assert values(write(tmp_path / f"{number}.json", text)) == ROWS


def test_of_several_lists_one_has_to_be_named_and_they_are_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps({"train": ROWS[:1], "more": {"test": ROWS[1:], "a.b": ROWS}}))
    with pytest.raises(DatasetError, match="several lists of rows: .*dataset.field=train; there are: train, more.test"):
        dataset(path)
    assert values(path, field="train") == ROWS[:1]
    assert values(path, field="more.test") == ROWS[1:]
    assert values(path, field="more.a.b") == ROWS
    with pytest.raises(DatasetError, match="no list 'more.dev', as dataset.field= names; there are: more.test, more.a"):
        read(path, field="more.dev")


def test_one_object_with_a_prompt_or_messages_is_a_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "hi"}]}
    assert values(write(tmp_path / "a.json", json.dumps(row, indent=1))) == [row]
    with pytest.raises(LLMConfigError, match="dataset.field='x' is for JSON files"):
        dataset(write(tmp_path / "a.csv", "prompt\n"), field="x")


def test_a_format_can_be_said_and_one_that_is_none_is_refused(tmp_path: Path) -> None:
    assert values(write(tmp_path / "a.dat", "prompt;n\nx;1\n"), format="csv") == [{"prompt": "x", "n": "1"}]
    assert len(read(write(tmp_path / "b.jsonl", ARRAY), format="jsonl")) == 1
    with pytest.raises(LLMConfigError, match="dataset.format='xml' is not allowed; it must be auto or one of jsonl"):
        dataset(tmp_path / "a.dat", format="xml")


@pytest.mark.parametrize("magic", formats._FOREIGN)
def test_what_a_file_is_instead_is_said_with_the_remedy(tmp_path: Path, magic: bytes) -> None:
    with pytest.raises(DatasetError, match=r"a\.csv is .*: (save|write|pack)"):
        dataset(write(tmp_path / "a.csv", magic + b"\0" * 20))


# --- CSV --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "id;prompt;note\n1;a, b;x\n2;c;\n"),
        ("a.csv", "id\tprompt\tnote\n1\ta, b\tx\n2\tc\t\n"),
        ("a.tsv", "id\tprompt\tnote\r\n1\ta, b\tx\r\n2\tc\t\r\n"),
        ("a.csv", 'id|prompt|"note"\n1|a, b|x\n2|c|\n'),
        ("a.csv", 'sep=;\r\nid;prompt;note\r\n1;"a, b";x\r\n2;c;\r\n'),
        ("a.csv", 'id , prompt,\tnote,,\r\n1,"a, b",x,,\r\n2,c,,,\r\n'),
        ("a.csv", "\n\nid;prompt;note;;\n1;a, b;x;;\n2;c;\n"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-8-sig"])
def test_csv_is_read_as_spreadsheets_write_it(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    path = write(tmp_path / name, text.encode(encoding))
    assert values(path) == [{"id": "1", "prompt": "a, b", "note": "x"}, {"id": "2", "prompt": "c", "note": None}]
    first = text.index("1", text.index("note"))
    assert read(path)[0].line == text.count("\n", 0, first) + 1


def test_the_delimiter_is_told_by_the_columns_that_are_looked_for(tmp_path: Path) -> None:
    assert values(write(tmp_path / "a.csv", "prompt,a;b;c;d\nx,y\n")) == [{"prompt": "x", "a;b;c;d": "y"}]
    columns = ColumnsConfig(prompt="question, as asked")
    path = write(tmp_path / "b.csv", "question, as asked;answer, if any, or none\nx;y\n")
    assert values(path, columns=columns)[0]["question, as asked"] == "x"


@pytest.mark.parametrize("delimiter", ["^", "tab", "\\t", ";"])
def test_a_delimiter_can_be_said(tmp_path: Path, delimiter: str) -> None:
    sign = {"tab": "\t", "\\t": "\t"}.get(delimiter, delimiter)
    path = write(tmp_path / "a.csv", f"prompt{sign}a,b,c,d\nx{sign}y\n")
    assert values(path, csv=CsvConfig(delimiter)) == [{"prompt": "x", "a,b,c,d": "y"}]


@pytest.mark.parametrize("delimiter", ["", ";;", '"', "\n"])
def test_a_delimiter_that_can_be_none_is_refused(delimiter: str) -> None:
    with pytest.raises(LLMConfigError, match="dataset.csv.delimiter=.* must be one character, or comma"):
        CsvConfig(delimiter)


def test_a_cell_under_no_name_is_not_dropped_in_silence(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a.csv", "prompt,note,,\na,b,,\na,b,c,\n"))
    assert [row.error for row in rows] == [None, "4 cells, and the header has 2"]


def test_text_of_another_encoding_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="the header is not valid UTF-8; save the file as UTF-8"):
        read(write(tmp_path / "a.csv", "prompt;réponse\nx;y\n".encode("cp1252")))


# --- columns inside of columns ----------------------------------------------------------------------------------------


def test_columns_are_named_by_a_path_and_one_of_that_very_name_comes_first(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Callable[..., llmpipe.RunConfig]
) -> None:
    body = {"messages": [{"role": "user", "content": "one two"}], "want.ed": "one two"}
    path = write_jsonl(
        {"custom": {"id": "x"}, "body": body}, {"custom": {"id": "y"}, "body": None, "body.messages": "[]"}
    )
    columns = [f"dataset.columns.{key}" for key in ("id=custom.id", "messages=body.messages", "reference=body.want.ed")]
    llmpipe.run(echo_config(path, *columns), tmp_path / "run")
    rows = llmpipe.read_run(tmp_path / "run").rows
    assert rows["id"].tolist() == ["x", "y"]
    assert rows["completion"].tolist()[0] == "one two" and rows["score_exact_match"].tolist()[0] == 1.0
    assert rows["error"].tolist()[1] == "messages are an empty list"


def test_a_field_of_a_parquet_struct_is_a_column_and_its_type_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"data": [{"question": "hi", "n": 5}]}), path)
    found = dataset(path, columns=ColumnsConfig(prompt="data.question"))
    assert found.scan().columns == ["data", "data.question"]
    with pytest.raises(DatasetError, match="'data.n' of .* is int64, and must be text"):
        dataset(path, columns=ColumnsConfig(prompt="data.n")).scan()
    with pytest.raises(DatasetError, match=r"no column 'data\.m'; it has: data"):
        dataset(path, columns=ColumnsConfig(prompt="data.m")).scan()
    assert dataset(path).scan(template=["data.question"]).rows == 1


def test_where_messages_are_inside_of_another_column_the_refusal_names_them(write_jsonl: Callable[..., Path]) -> None:
    with pytest.raises(DatasetError, match=r"for instance dataset\.columns\.messages=body\.messages"):
        dataset(write_jsonl({"custom_id": "a", "body": {"messages": []}})).scan()


def test_chats_as_sharegpt_has_them_are_chats(
    tmp_path: Path, write_jsonl: Callable[..., Path], echo_config: Callable[..., llmpipe.RunConfig]
) -> None:
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "a b"}, {"from": "gpt", "value": "c"}]
    again = {"from": "human", "value": "d e"}
    rows = [
        {"conversations": [*turns, again]},
        {"conversations": json.dumps([again])},
        {"conversations": [{"from": "x"}]},
    ]
    path = write_jsonl(*rows, {"conversations": [{"role": "user", "content": "own"}]})
    for name in ("run", "named"):
        llmpipe.run(
            echo_config(path, *(["dataset.columns.messages=conversations"] * (name == "named"))), tmp_path / name
        )
        found = llmpipe.read_run(tmp_path / name).rows
        assert found["completion"].tolist()[:2] == ["d e", "d e"] and found["completion"].tolist()[3] == "own"
        assert "role 'x'" in found["error"].tolist()[2]


# --- Parquet ----------------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "a b"}]
MESSAGE = pa.struct({"role": pa.string(), "content": pa.string()})
AS_MAP = pa.map_(pa.string(), pa.string())


@pytest.mark.parametrize(
    "column",
    [
        pa.array([CHAT, CHAT], pa.list_(MESSAGE, 1)),
        pa.array([CHAT, CHAT], pa.large_list(MESSAGE)),
        pa.array([[list(CHAT[0].items())]] * 2, pa.list_(AS_MAP)),
        pa.array([json.dumps(CHAT)] * 2, pa.large_string()),
        pa.ExtensionArray.from_storage(pa.json_(), pa.array([json.dumps(CHAT)] * 2)),
        pa.array([json.dumps(CHAT)] * 2).dictionary_encode(),
    ],
    ids=lambda column: str(column.type)[:20],
)
def test_chats_of_any_arrow_type_are_answered(
    tmp_path: Path, echo_config: Callable[..., llmpipe.RunConfig], column: Any
) -> None:
    pq.write_table(pa.table({"messages": column}), tmp_path / "a.data")
    for format in ("jsonl", "parquet"):
        llmpipe.run(echo_config(tmp_path / "a.data", f"output={format}"), tmp_path / format)
        assert llmpipe.read_run(tmp_path / format).rows["completion"].tolist() == ["a b", "a b"]


def test_json_inside_of_lists_and_maps_as_options_mean_what_they_say(tmp_path: Path) -> None:
    call = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"n": 10000000000000000000000}', "no json", None]))
    calls = pa.ListArray.from_arrays(pa.array([0, 3], pa.int32()), call)
    options = pa.array([[("max_tokens", 3)]], pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"prompt": ["x"], "calls": calls, "sampling": options}), tmp_path / "a.parquet")
    assert dataset(tmp_path / "a.parquet").scan().rows == 1
    (row,) = values(tmp_path / "a.parquet")
    assert row == {"prompt": "x", "calls": [{"n": 10**22}, "no json", None], "sampling": {"max_tokens": 3}}


# --- directories ------------------------------------------------------------------------------------------------------


def test_directories_of_a_partitioned_dataset_are_columns(
    tmp_path: Path, echo_config: Callable[..., llmpipe.RunConfig]
) -> None:
    table = pa.table({"prompt": ["a", "b", "c"], "lang": ["en", None, "f r"], "year": [2024, 2025, 2024]})
    pq.write_to_dataset(table, tmp_path / "hive", partition_cols=["lang", "year"])
    for path in (tmp_path / "hive", tmp_path / "hive/**/*.parquet", tmp_path / "hive/lang=*/*/*"):
        found = {row["prompt"]: (row["lang"], row["year"]) for row in values(path)}
        assert found == {"a": ("en", 2024), "b": (None, 2025), "c": ("f r", 2024)}
        assert dataset(path).scan(template=["lang"]).columns == ["prompt", "lang", "year"]
    for format in ("jsonl", "parquet"):
        llmpipe.run(echo_config(tmp_path / "hive", f"output={format}"), tmp_path / format)
        rows = llmpipe.read_run(tmp_path / format).rows.sort_values("prompt")
        assert rows["lang"].fillna("-").tolist() == ["en", "-", "f r"] and rows["year"].tolist() == [2024, 2025, 2024]


def test_text_in_a_partitioned_directory_has_its_columns_too_and_keeps_its_own(tmp_path: Path) -> None:
    (tmp_path / "d" / "split=train").mkdir(parents=True)
    write(tmp_path / "d" / "split=train" / "p.jsonl", '{"prompt": "a"}\n{"split": "mine", "prompt": "b"}\n{}\n{bad\n')
    rows = read(tmp_path / "d")
    assert [row.values.get("split") for row in rows] == ["train", "mine", "train", None]
    assert [row.raw for row in rows] == [
        b'{"prompt": "a","split": "train"}',
        b'{"split": "mine", "prompt": "b"}',
        b'{"split": "train"}',
        b"{bad",
    ]
    assert "split" not in values(write(tmp_path / "d" / "split=train" / "q.jsonl", '{"prompt": "a"}'))[0]


def test_a_directory_is_all_its_files_but_the_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/c.jsonl.gz", ".hidden.jsonl", "_temporary/x.jsonl", "notes.md"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"prompt": name}).encode()
        write(tmp_path / "d" / name, gzip.compress(text) if name.endswith("gz") else text)
    assert [row["prompt"] for row in values(tmp_path / "d")] == ["a/c.jsonl.gz", "b.jsonl"]
    write(tmp_path / "d" / "x.csv", "prompt\n")
    with pytest.raises(DatasetError, match=r"several types: \.csv, \.jsonl; choose with a glob"):
        dataset(tmp_path / "d")


@pytest.mark.parametrize("text", ["[", "[]", "[1, 2]", "[5]\n", "\0\1\0\1"])
def test_jsonl_that_could_be_nothing_else_is_not_taken_for_it(tmp_path: Path, text: str) -> None:
    assert [bool(row.error) for row in read(write(tmp_path / "a.jsonl", text))] == [True]
    if text == "[]":
        assert read(write(tmp_path / "a.json", text)) == []

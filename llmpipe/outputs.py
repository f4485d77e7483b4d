"""Rows and their completions → the files of a run directory, in input order, whole or not at all.

Each file is written under a temporary name, synced, then renamed. A row's own columns come out as they went in: text
rows are spliced as they stand, Arrow columns are passed on as Arrow.

To add a format: write a class like `JsonlWriter` and name it in `WRITERS`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

import orjson

from llmpipe.config import OutputConfig, OutputFormat
from llmpipe.exceptions import DatasetError, LLMError, MissingDependencyError
from llmpipe.records import Completion, Row

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

METRICS_FILE = "metrics.json"
ERRORS_FILE = "errors.jsonl"
PARQUET_GROUP_ROWS = 8192
ID = "id"
AS_JSON = {b"llmpipe": b"json"}
"""Metadata of a Parquet column whose values are JSON text."""

COLUMNS = {
    "completion": "string",
    "finish_reason": "string",
    "prompt_tokens": "int64",
    "cached_prompt_tokens": "int64",
    "completion_tokens": "int64",
    "queue_s": "float64",
    "first_token_s": "float64",
    "latency_s": "float64",
    "error": "string",
}
"""The columns that every output row gains, with their Arrow types."""


@dataclass(frozen=True)
class Layout:
    """Which columns an output row gains, in order."""

    prefix: str
    id_column: str
    adds_id: bool
    """Whether the dataset lacks a column `id`, so that one is added."""
    sample: bool
    truncated: bool
    scorers: tuple[str, ...]

    def types(self) -> dict[str, str]:
        """Return name → Arrow type of the added columns, prefix included."""
        names = {ID: "string"} if self.adds_id else {}
        names |= {"sample": "int64"} if self.sample else {}
        names |= COLUMNS
        names |= {"truncated_prompt_tokens": "int64"} if self.truncated else {}
        names |= {f"score_{name}": "float64" for name in self.scorers}
        return {self.prefix + name: kind for name, kind in names.items()}

    def values(self, row: Row, completion: Completion) -> list[Any]:
        """Return the added values of one output row, in the order of `types`."""
        values: list[Any] = [str(row.id(self.id_column))] if self.adds_id else []
        if self.sample:
            values.append(completion.sample)
        c = completion
        values += [c.text, c.finish_reason, c.prompt_tokens, c.cached_prompt_tokens, c.completion_tokens]
        values += [c.queue_s, c.first_token_s, c.latency_s, c.error]
        if self.truncated:
            values.append(c.truncated_prompt_tokens)
        return values + [c.scores.get(name) for name in self.scorers]

    def check(self, dataset_columns: Sequence[str]) -> None:
        """Refuse a dataset that already has a column that would be added.

        Raises:
            DatasetError: names the columns and the remedy.
        """
        taken = [name for name in self.types() if name in dataset_columns]
        if taken:
            raise DatasetError(
                f"the dataset already has the column {', '.join(map(repr, taken))} that llmpipe would add: "
                f"set output.prefix=, for instance output.prefix=llm_"
            )


class Answered(NamedTuple):
    """One output row: an input row and one of its completions."""

    row: Row
    completion: Completion


def join(rows: Iterable[Row], completions: Iterable[Completion]) -> Iterator[Answered]:
    """Bring rows and completions together; both must be in order.

    Raises:
        LLMError: a row has no completion.
    """
    source = iter(completions)
    completion = next(source, None)
    for row in rows:
        if completion is None or completion.request_id != row.index:
            raise LLMError(f"{row.file} line {row.line} has no answer in the ledger; resume the run")
        while completion is not None and completion.request_id == row.index:
            yield Answered(row, completion)
            completion = next(source, None)


# --- formats ----------------------------------------------------------------------------------------------------------


class Writer(Protocol):
    """What a format has to do."""

    def __init__(self, file: IO[bytes], layout: Layout, rows: Callable[[], Iterator[Row]]) -> None:
        """Begin a file; `rows` reads the dataset anew, for formats that need to know all types first."""

    def write(self, answered: Answered) -> None:
        """Append one output row."""

    def finish(self) -> None:
        """Write what is still held."""


class JsonlWriter:
    """One JSON object per line."""

    def __init__(self, file: IO[bytes], layout: Layout, rows: Callable[[], Iterator[Row]]) -> None:
        self._file = file
        self._layout = layout
        self._names = list(layout.types())

    def write(self, answered: Answered) -> None:
        """Append one output row: the row as it stands in its file, with the new columns spliced in at the end."""
        row, completion = answered
        added = dict(zip(self._names, self._layout.values(row, completion), strict=True))
        if not self._layout.adds_id and row.values.get(ID) is None:
            added = {ID: row.id(self._layout.id_column), **added}
        if row.error is not None:
            own = b"{}"
        elif row.raw is None or (ID in added and ID in row.values):
            own = dump_json({name: value for name, value in row.values.items() if name not in added})
        else:
            own = row.raw
        body = own[1:-1].strip()
        self._file.write(b"{" + body + (b"," if body else b"") + orjson.dumps(added)[1:] + b"\n")

    def finish(self) -> None:
        """Nothing is held."""


class ParquetWriter:
    """Typed columns. Those of Parquet datasets are kept; those of text datasets are inferred from all rows."""

    def __init__(self, file: IO[bytes], layout: Layout, rows: Callable[[], Iterator[Row]]) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise MissingDependencyError("pyarrow", "parquet", "output=parquet") from error
        self._pa = pa
        self._layout = layout
        self._own = infer_schema(rows())
        self._added = pa.schema([pa.field(name, kind) for name, kind in layout.types().items()])
        self._schema = pa.schema([*self._own, *self._added])
        self._writer = pq.ParquetWriter(file, self._schema, compression="zstd")
        self._held: list[Answered] = []

    def write(self, answered: Answered) -> None:
        """Append one output row."""
        self._held.append(answered)
        if len(self._held) >= PARQUET_GROUP_ROWS:
            self._flush()

    def finish(self) -> None:
        """Write the last group and the footer."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if not self._held:
            return
        added = zip(*(self._layout.values(row, completion) for row, completion in self._held), strict=True)
        arrays = [self._pa.array(values, field.type) for values, field in zip(added, self._added, strict=True)]
        own = self._own_columns([row for row, _ in self._held])
        self._writer.write_table(self._pa.Table.from_arrays([*own, *arrays], schema=self._schema))
        self._held.clear()

    def _own_columns(self, rows: list[Row]) -> list[Any]:
        if all(row.batch is not None for row in rows):
            table = self._pa.concat_tables(_taken(rows), promote_options="permissive")
            names = table.column_names
            columns = [
                table[f.name].cast(f.type) if f.name in names else self._pa.nulls(len(rows), f.type) for f in self._own
            ]
        else:
            columns = [self._convert(field, [row.values.get(field.name) for row in rows]) for field in self._own]
        if not self._layout.adds_id and self._pa.types.is_string(self._own.field(ID).type):
            ids = self._pa.array([str(row.id(self._layout.id_column)) for row in rows], self._pa.string())
            columns[self._own.get_field_index(ID)] = ids
        return columns

    def _convert(self, field: pa.Field[Any], values: list[Any]) -> Any:
        if field.metadata == AS_JSON:
            values = [None if value is None else json.dumps(value) for value in values]
        return self._pa.array(values, field.type)


WRITERS: dict[OutputFormat, type[Writer]] = {
    OutputFormat.jsonl: JsonlWriter,
    OutputFormat.parquet: ParquetWriter,
}


def _taken(rows: list[Row]) -> Iterator[pa.Table]:
    """Take rows from their Arrow batches, successive rows of one batch together."""
    import pyarrow as pa

    for _, group in groupby(rows, key=lambda row: id(row.batch[0]) if row.batch else 0):
        places = [row.batch for row in group if row.batch is not None]
        yield pa.Table.from_batches([places[0][0]]).take([position for _, position in places])


def infer_schema(rows: Iterator[Row]) -> pa.Schema:
    """Return the Arrow schema that holds every row's own columns.

    A column of text rows that fits no Arrow type (numbers and text mixed, integers beyond 64 bits, empty objects) is
    kept as JSON text, and its field says so in its metadata.
    """
    import pyarrow as pa

    kinds: dict[str, Any] = {}
    last_batch: Any = None
    while block := list(islice(rows, PARQUET_GROUP_ROWS)):
        for row in block:
            if row.batch is not None and row.batch[0] is not last_batch:
                last_batch = row.batch[0]
                for field in last_batch.schema:
                    kinds[field.name] = _common_type(kinds.get(field.name, pa.null()), field.type)
        values = [row.values for row in block if row.batch is None]
        for name in dict.fromkeys(name for one in values for name in one):
            found = _type_of([one.get(name) for one in values])
            kinds[name] = _common_type(kinds.get(name, pa.null()), found)
    return pa.schema([_field(name, kind) for name, kind in kinds.items()])


def _field(name: str, kind: Any) -> pa.Field[Any]:
    import pyarrow as pa

    if kind is None:
        return pa.field(name, pa.string(), metadata=AS_JSON)
    return pa.field(name, pa.string() if pa.types.is_null(kind) else kind)


def _type_of(values: list[Any]) -> Any:
    """Return the Arrow type of JSON values, or None where there is none that Parquet can hold."""
    import pyarrow as pa

    kinds = {type(value) for value in values} - {type(None)}
    if len(kinds) > 1 and kinds != {int, float}:
        return None
    if kinds == {int, float} and any(abs(value) > 2**53 for value in values if type(value) is int):
        return None  # a float would round them
    try:
        kind = pa.array(values).type
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
        return None
    return kind if _is_storable(kind) else None


def _common_type(one: Any, other: Any) -> Any:
    """Return the Arrow type that holds the values of both, or None where there is none."""
    import pyarrow as pa

    if one is None or other is None:
        return None
    if (
        pa.types.is_integer(one)
        and pa.types.is_floating(other)
        or pa.types.is_floating(one)
        and pa.types.is_integer(other)
    ):
        return None  # the integers' size is not known any more, so a float might round them
    try:
        schemas = [pa.schema([("", one)]), pa.schema([("", other)])]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None


def _is_storable(kind: Any) -> bool:
    """Say whether Parquet can hold the type; it has no struct without fields."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.num_fields > 0 and all(_is_storable(field.type) for field in kind)
    return not pa.types.is_list(kind) or _is_storable(kind.value_type)


def dump_json(values: Any) -> bytes:
    """Write values as one line of JSON, exactly: integers of any size, NaN, Infinity; other types as text."""
    return json.dumps(values, ensure_ascii=False, default=_json_default).encode("utf-8", "surrogatepass")


def _json_default(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return str(value)


# --- files of a run ---------------------------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears under its name complete and synced, or not at all.

    Raises:
        LLMError: the disk is full or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise LLMError(f"cannot write {path}: {error.strerror or error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":  # elsewhere a directory cannot be opened, and the rename is durable by itself
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def output_file(directory: Path, config: OutputConfig) -> Path:
    """Return where a run's answers go."""
    return directory / f"outputs.{config.format.value}"


def write_outputs(
    directory: Path,
    config: OutputConfig,
    layout: Layout,
    rows: Callable[[], Iterator[Row]],
    answered: Iterable[Answered],
) -> dict[str, str]:
    """Write the answers and `errors.jsonl`; return the digest of each file.

    Args:
        directory: The run directory.
        config: Format of the answers.
        layout: Columns to add.
        rows: Reads the dataset anew.
        answered: Every output row, in order; read once.

    Raises:
        LLMError: a file cannot be written.
    """
    path, errors = output_file(directory, config), directory / ERRORS_FILE
    with atomic_file(path) as file, atomic_file(errors) as error_file:
        writer = WRITERS[config.format](file, layout, rows)
        for one in answered:
            writer.write(one)
            if one.completion.error is not None:
                error_file.write(dump_json(_error_record(one, layout)) + b"\n")
        writer.finish()
    return {file.name: file_digest(file) for file in (path, errors)}


def _error_record(answered: Answered, layout: Layout) -> dict[str, Any]:
    row, completion = answered
    raw: Any = row.values
    if row.raw is not None:
        raw = row.raw.decode("utf-8", "backslashreplace")
    return {
        "id": row.id(layout.id_column),
        "sample": completion.sample,
        "file": row.file,
        "line": row.line,
        "reason": completion.error,
        "raw": raw,
    }


def write_metrics(directory: Path, metrics: dict[str, Any]) -> None:
    """Write `metrics.json`."""
    with atomic_file(directory / METRICS_FILE) as file:
        file.write(orjson.dumps(metrics, option=orjson.OPT_INDENT_2) + b"\n")


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RunFiles(NamedTuple):
    """What a finished run left: `rows, metrics = read_run(directory)`."""

    rows: pd.DataFrame
    metrics: dict[str, Any]


def read_run(directory: str | Path) -> RunFiles:
    """Return a finished run's output rows as a DataFrame, and its metrics.

    Raises:
        LLMError: the directory holds no finished run.
        MissingDependencyError: pandas is not installed.
    """
    directory = Path(directory)
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingDependencyError("pandas", "pandas", "read_run") from error
    files = [directory / f"outputs.{kind.value}" for kind in OutputFormat]
    found = next((file for file in files if file.is_file()), None)
    if found is None or not (directory / METRICS_FILE).is_file():
        raise LLMError(
            f"{directory} holds no finished run; there should be {METRICS_FILE} and outputs.jsonl or .parquet"
        )
    metrics = orjson.loads((directory / METRICS_FILE).read_bytes())
    if found.suffix == ".parquet":
        return RunFiles(pd.read_parquet(found), metrics)
    with found.open("rb") as lines:
        return RunFiles(pd.DataFrame([json.loads(line) for line in lines]), metrics)

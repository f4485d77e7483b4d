"""Rows and their completions → the files of a run directory, in input order, whole or not at all.

Files are written under temporary names, synced, then renamed. A row's own columns come out as they went in: text
rows are spliced as they stand, Arrow columns are passed on as Arrow.

To add a format: write a class like `JsonlWriter` and name it in `WRITERS`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

import orjson

from llmpipe.arrow_types import AS_JSON, infer_schema
from llmpipe.config import OutputConfig, OutputFormat
from llmpipe.exceptions import DatasetError, LedgerError, LLMError, MissingDependencyError
from llmpipe.records import Completion, Row

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

METRICS_FILE = "metrics.json"
ERRORS_FILE = "errors.jsonl"
PARQUET_GROUP_ROWS = 8192
ID = "id"

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
        comma = b"," if own[1:-1].strip() else b""
        self._file.write(own[:-1] + comma + _dump_added(added)[1:] + b"\n")

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
        place = self._own.get_field_index(ID)
        # Rows without an id get one, as far as the column can hold it.
        self._fills_ids = not layout.adds_id and (place < 0 or pa.types.is_string(self._own.field(place).type))
        if self._fills_ids:
            others = [field for field in self._own if field.name != ID]
            others.insert(max(0, place), pa.field(ID, pa.string()))
            self._own = pa.schema(others)
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
        try:
            self._flush()
        finally:
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
        groups = groupby(rows, key=lambda row: id(row.batch[0]) if row.batch else None)
        tables = [self._own_table(list(group)) for _, group in groups]
        return list(self._pa.concat_tables(tables).columns)

    def _own_table(self, rows: list[Row]) -> pa.Table:
        """Return the own columns of rows that come from one Arrow batch, or from none."""
        places = [row.batch for row in rows if row.batch is not None]
        arrow = places[0][0].take(self._pa.array([place for _, place in places])) if places else None
        columns = [self._own_column(field, rows, arrow) for field in self._own]
        return self._pa.Table.from_arrays(columns, schema=self._own)

    def _own_column(self, field: pa.Field[Any], rows: list[Row], arrow: pa.RecordBatch | None) -> Any:
        if field.name == ID and self._fills_ids:
            return self._pa.array([str(row.id(self._layout.id_column)) for row in rows], field.type)
        as_json = field.metadata == AS_JSON
        if arrow is not None and field.name in arrow.schema.names and not as_json:
            column = arrow.column(field.name)
            if column.type == field.type:
                return column
        values = [row.values.get(field.name) for row in rows]
        if as_json:
            values = [None if value is None else dump_json(value).decode() for value in values]
        return self._pa.array(values, field.type)


WRITERS: dict[OutputFormat, type[Writer]] = {
    OutputFormat.jsonl: JsonlWriter,
    OutputFormat.parquet: ParquetWriter,
}


def dump_json(values: Any) -> bytes:
    """Write values as one line of JSON, exactly: integers of any size, NaN, Infinity; other types as text."""
    options: dict[str, Any] = {"separators": (",", ":"), "default": _json_default}
    try:
        return json.dumps(values, ensure_ascii=False, **options).encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can hold
        return json.dumps(values, **options).encode("utf-8")


def _dump_added(values: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(values)  # ten times faster, and exact for what llmpipe itself adds
    except TypeError:  # half of a surrogate pair in an answer or an id
        return dump_json(values)


def _json_default(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return str(value)


# --- files of a run ---------------------------------------------------------------------------------------------------


def output_file(config: OutputConfig) -> str:
    """Return the name of the file with a run's answers."""
    return f"outputs.{config.format.value}"


def output_files(config: OutputConfig) -> tuple[str, str, str]:
    """Return the names of the files that a run ends with."""
    return output_file(config), ERRORS_FILE, METRICS_FILE


def found_files(directory: Path, names: Iterable[str], known: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the digest of each file that is there already, having made sure that it is the run's own.

    Args:
        directory: The run directory.
        names: The files to look for, besides the known ones.
        known: The digests that a file may have, by name.

    Raises:
        LedgerError: a file is of another origin or was changed.
    """
    there = {name: file_digest(directory / name) for name in {*names, *known} if os.path.lexists(directory / name)}
    for name, digest in sorted(there.items()):
        if name not in known:
            raise LedgerError(f"{directory / name} is not of this run; move it away, or choose another hydra.run.dir")
        if digest not in known[name]:
            raise LedgerError(f"{directory / name} was changed since the run; move it away to have it written again")
    return there


@contextmanager
def new_files(directory: Path, names: Iterable[str]) -> Iterator[dict[str, IO[bytes]]]:
    """Open files that get their names when the block ends without an error; `seal` them first.

    Raises:
        LLMError: the disk is full or cannot be written.
    """
    temporaries = {name: directory / f".{name}.tmp" for name in names}
    try:
        with ExitStack() as stack:
            yield {name: stack.enter_context(_fresh(path)) for name, path in temporaries.items()}
        for name, temporary in temporaries.items():
            os.replace(temporary, directory / name)
        _sync_directory(directory)
    except OSError as error:
        raise LLMError(f"cannot write to {directory}: {error.strerror or error}") from error
    finally:
        for temporary in temporaries.values():
            with suppress(OSError):  # where nothing can be written, nothing can be removed
                temporary.unlink(missing_ok=True)


def _fresh(path: Path) -> IO[bytes]:
    path.unlink(missing_ok=True)  # of a run that was killed
    return path.open("xb")


def seal(files: Mapping[str, IO[bytes]]) -> dict[str, str]:
    """Make the content of open files durable, and return the digest of each."""
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
    return {name: file_digest(Path(file.name)) for name, file in files.items()}


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":  # elsewhere a directory cannot be opened, and the rename is durable by itself
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_answers(
    files: Mapping[str, IO[bytes]],
    config: OutputConfig,
    layout: Layout,
    rows: Callable[[], Iterator[Row]],
    answered: Iterable[Answered],
) -> None:
    """Write the answers, and the rows that failed to `errors.jsonl`.

    Args:
        files: The open files by name.
        config: Format of the answers.
        layout: Columns to add.
        rows: Reads the dataset anew.
        answered: Every output row, in order; read once.
    """
    writer = WRITERS[config.format](files[output_file(config)], layout, rows)
    try:
        for one in answered:
            writer.write(one)
            if one.completion.error is not None:
                files[ERRORS_FILE].write(dump_json(_error_record(one, layout)) + b"\n")
    finally:
        writer.finish()


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


def write_metrics(files: Mapping[str, IO[bytes]], metrics: dict[str, Any]) -> None:
    """Write `metrics.json`."""
    files[METRICS_FILE].write(orjson.dumps(metrics, option=orjson.OPT_INDENT_2) + b"\n")


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        LLMError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LLMError(f"cannot read {path}: {error.strerror or error}") from error


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
    metrics = orjson.loads(_finished(directory, METRICS_FILE).read_bytes())
    path = _finished(directory, metrics["output"])
    if path.suffix == ".parquet":
        return RunFiles(_read_parquet(path), metrics)
    with path.open("rb") as lines:
        return RunFiles(pd.DataFrame([json.loads(line) for line in lines]), metrics)


def _finished(directory: Path, name: str) -> Path:
    path = directory / name
    if not path.is_file():
        raise LLMError(f"{directory} holds no finished run: there is no {name} in it")
    return path


def _read_parquet(path: Path) -> pd.DataFrame:
    """Read answers in Parquet; columns kept as JSON text become their values again."""
    import pandas as pd
    import pyarrow.parquet as pq

    rows = pd.read_parquet(path)
    for field in pq.read_schema(path):
        if (field.metadata or {}).items() >= AS_JSON.items():
            values = [json.loads(cell) if isinstance(cell, str) else None for cell in rows[field.name]]
            rows[field.name] = pd.Series(values, rows.index, dtype=object)
    return rows

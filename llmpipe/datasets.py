"""File → rows, one at a time. Knows nothing of prompts or models.

A row that cannot be read is still a row: it carries the reason, and its place in the order. What would fail every row
(no such file, an unknown type, a missing column, duplicate ids) is refused by `Dataset.scan`, before a model loads.

To add a format: write a function like `read_jsonl` and name it in `READERS`.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import orjson

from llmpipe.config import ColumnsConfig, DatasetConfig
from llmpipe.exceptions import DatasetError, MissingDependencyError
from llmpipe.records import Row

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET_BATCH_ROWS = 1024


class Record(NamedTuple):
    """What a reader yields: a line number and either values or an error."""

    line: int
    values: dict[str, Any]
    raw: bytes | None = None
    error: str | None = None
    batch: tuple[pa.RecordBatch, int] | None = None


@dataclass(frozen=True)
class Scan:
    """What one look through the whole dataset found."""

    rows: int
    unreadable: int
    columns: list[str]
    digest: str


# --- formats ----------------------------------------------------------------------------------------------------------

_LONG_NUMBER = re.compile(rb"\d{16}")
_BOM = b"\xef\xbb\xbf"


def read_jsonl(path: Path) -> Iterator[Record]:
    """Yield one record per line that is not blank; lines end with LF or CRLF and nothing else."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(_BOM)
            line = line.strip(b" \t\r\n")
            if not line:
                continue
            try:
                values = parse_json(line)
            except (ValueError, RecursionError) as error:
                yield Record(number, {}, line, f"not valid JSON: {error}")
                continue
            if isinstance(values, dict):
                yield Record(number, values, line)
            else:
                yield Record(number, {}, line, f"a JSON {type(values).__name__}, not an object")


def parse_json(text: bytes) -> Any:
    """Parse JSON exactly: integers of any size, NaN and Infinity, lone surrogates.

    Raises:
        ValueError: the text is not JSON, or not UTF-8.
        RecursionError: it is nested too deeply.
    """
    # orjson is ten times faster, but rounds integers beyond 64 bits to floats.
    if not _LONG_NUMBER.search(text):
        try:
            return orjson.loads(text)
        except orjson.JSONDecodeError:
            pass  # perhaps one of the things that only the standard library reads
    return json.loads(text.decode("utf-8"))


def read_csv(path: Path) -> Iterator[Record]:
    """Yield one record per line of a CSV file with a header; all values are text."""
    csv.field_size_limit(2**31 - 1)
    with _open(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, strict=True)
        header = next(reader, [])
        if len(set(header)) != len(header):
            raise DatasetError(f"{path}: the header names a column twice: {', '.join(header)}")
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield Record(line, {}, None, f"not valid CSV: {error}")
                continue
            if cells is None:
                return
            if not cells:
                continue
            raw = ",".join(cells).encode("utf-8", "surrogateescape")
            if len(cells) != len(header):
                yield Record(line, {}, raw, f"{len(cells)} cells, and the header has {len(header)}")
            elif not _is_utf8(raw):
                yield Record(line, {}, raw, "not valid UTF-8")
            else:
                yield Record(line, dict(zip(header, cells, strict=True)))


def read_parquet(path: Path) -> Iterator[Record]:
    """Yield one record per row of a Parquet file."""
    number = 0
    for batch in _parquet_file(path).iter_batches(PARQUET_BATCH_ROWS):
        for i, values in enumerate(batch.to_pylist()):
            number += 1
            yield Record(number, values, batch=(batch, i))


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
COMPRESSIONS = (".gz", ".zst")


def _parquet_file(path: Path) -> Any:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "parquet", f"reading {path.name}") from error
    try:
        return pq.ParquetFile(path)
    except Exception as error:
        raise DatasetError(f"{path} is not a readable Parquet file: {' '.join(str(error).split())}") from error


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise MissingDependencyError("zstandard", "zstd", f"reading {path.name}") from error
        stream: IO[bytes] = io.BufferedReader(zstandard.open(path, "rb"))
        return stream
    return path.open("rb")


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


# --- the dataset ------------------------------------------------------------------------------------------------------


class Dataset:
    """The rows of one or several files, in order, read anew at every pass.

    Raises:
        DatasetError: a file does not exist or is of no known type.
    """

    def __init__(self, config: DatasetConfig) -> None:
        self.columns: ColumnsConfig = config.columns
        self._limit = config.limit
        self.files = [file for path in config.paths for file in _expand(path)]
        self._readers = [(file, _reader(file)) for file in self.files]

    def rows(self) -> Iterator[Row]:
        """Yield every row up to the limit; memory does not grow with the dataset.

        Raises:
            DatasetError: a file ends in the middle, or cannot be read on.
        """
        records = ((file, record) for file, reader in self._readers for record in _guarded(file, reader))
        for index, (file, record) in enumerate(islice(records, self._limit)):
            yield Row(index, file.name, record.line, record.values, record.raw, record.error, record.batch)

    def scan(self, needed: list[str] | None = None) -> Scan:
        """Look through all rows once.

        Args:
            needed: Columns without which no row can be run, beside a prompt or messages.

        Raises:
            DatasetError: a file is damaged, ids are not unique, or a column that every row needs is not there.
        """
        columns: dict[str, None] = {}
        id_hashes = array("q")
        rows = unreadable = 0
        for row in self.rows():
            rows += 1
            unreadable += row.error is not None
            columns.update(dict.fromkeys(row.values))
            id_hashes.append(hash(str(row.id(self.columns.id))))
        for file, reader in self._readers:
            if reader is read_parquet:
                columns.update(dict.fromkeys(_parquet_file(file).schema_arrow.names))
        self._check_columns(list(columns), rows - unreadable, needed)
        self._check_ids(np.frombuffer(id_hashes, np.int64) if rows else np.zeros(0, np.int64))
        return Scan(rows, unreadable, list(columns), self._digest())

    def _check_columns(self, columns: list[str], readable: int, needed: list[str] | None) -> None:
        default = ColumnsConfig()
        wanted = list(needed or [])
        wanted += [name for key, name in vars(self.columns).items() if name != getattr(default, key)]
        if not readable and not columns:
            return
        for name in wanted:
            if name not in columns:
                raise DatasetError(f"{self._name()} has no column {name!r}; it has: {', '.join(columns)}")
        if not needed and self.columns.prompt not in columns and self.columns.messages not in columns:
            raise DatasetError(
                f"{self._name()} has neither a column {self.columns.prompt!r} nor {self.columns.messages!r}; it has: "
                f"{', '.join(columns)}. Name one with dataset.columns.prompt= or dataset.columns.messages="
            )

    def _check_ids(self, hashes: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        ordered = np.sort(hashes)
        suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        if not suspects:
            return
        seen: dict[str, Row] = {}
        for row in self.rows():
            name = str(row.id(self.columns.id))
            if hash(name) in suspects:
                if name in seen:
                    first = seen[name]
                    raise DatasetError(
                        f"the id {name!r} stands twice: {first.file} line {first.line} and {row.file} line {row.line}; "
                        f"make ids unique, or name another column with dataset.columns.id="
                    )
                seen[name] = row

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return f"sha256:{digest.hexdigest()[:32]}"

    def _name(self) -> str:
        return str(self.files[0]) if len(self.files) == 1 else f"the dataset of {len(self.files)} files"


def _expand(path: str) -> list[Path]:
    if any(character in path for character in "*?[") and not Path(path).exists():
        found = sorted(Path(name) for name in glob.glob(path, recursive=True))
        if not found:
            raise DatasetError(f"dataset.path={path!r} matches no file (from {Path.cwd()})")
        return found
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is a directory" if file.is_dir() else "does not exist"
        raise DatasetError(
            f"dataset.path={path!r} {what} (from {Path.cwd()}); it must be a file, a glob or a list of them"
        )
    return [file]


def _reader(file: Path) -> Callable[[Path], Iterator[Record]]:
    plain = file.with_suffix("") if file.suffix in COMPRESSIONS else file
    reader = READERS.get(plain.suffix.lower())
    if reader is None or (reader is read_parquet and plain is not file):
        raise DatasetError(
            f"{file.name} is of no known type; there are {', '.join(READERS)}, the text ones also with .gz or .zst"
        )
    return reader


def _guarded(file: Path, reader: Callable[[Path], Iterator[Record]]) -> Iterator[Record]:
    """Read a file; a fault of the file as a whole names the file."""
    try:
        yield from reader(file)
    except (DatasetError, MissingDependencyError):
        raise
    except GeneratorExit:
        raise
    except Exception as error:  # gzip, zstandard and pyarrow each have errors of their own for a damaged file
        raise DatasetError(f"{file} cannot be read to its end: {' '.join(str(error).split())}") from error

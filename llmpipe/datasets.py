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
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import orjson

from llmpipe.config import ColumnsConfig, DatasetConfig
from llmpipe.exceptions import DatasetError, MissingDependencyError
from llmpipe.records import Row, is_utf8

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET_BATCH_ROWS = 1024
MAX_LEVELS = 200
"""How deep objects and lists of a row may nest, so that every writer can walk them."""
MAX_ROW_LINES = 2**16
"""Most lines that the quoted cells of a CSV row may span; what goes on longer is a quote that was never closed."""


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
_BLANKS = b" \t\r\n"


def read_jsonl(path: Path) -> Iterator[Record]:
    """Yield one record per line that is not blank; lines end with LF or CRLF and nothing else."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(_BOM)
            indent = len(line) - len(line.lstrip(_BLANKS))
            line = line.strip(_BLANKS)
            if not line:
                continue
            try:
                values = parse_json(line)
            except json.JSONDecodeError as error:
                yield Record(number, {}, line, f"not valid JSON at column {indent + error.colno}: {error.msg}")
                continue
            except (ValueError, RecursionError) as error:
                yield Record(number, {}, line, f"not valid JSON: {error}")
                continue
            problem = _problem(values, line)
            yield Record(number, {} if problem else values, line, problem)


def _problem(values: Any, text: bytes) -> str | None:
    """Say why a JSON value is no row, or None."""
    if not isinstance(values, dict):
        return f"a JSON {type(values).__name__}, not an object"
    if b"\\u" in text and not all(is_utf8(name) for name in values):
        return "a column's name holds a lone surrogate, which no UTF-8 text can"
    if text.count(b"{") + text.count(b"[") > MAX_LEVELS and _levels(values) > MAX_LEVELS:
        return f"nested more than {MAX_LEVELS} levels deep"
    return None


def _levels(value: Any) -> int:
    levels, layer = 0, [value]
    while layer := [inner for outer in layer if isinstance(outer, (dict, list)) for inner in _inside(outer)]:
        levels += 1
    return levels


def _inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


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
    """Yield one record per row of a CSV file with a header; all values are text, and an empty cell is null."""
    csv.field_size_limit(2**31 - 1)
    with _open(path) as file:
        lines = _Lines(io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=""))
        reader = csv.reader(lines, strict=True)
        header = next((cells for cells in reader if cells), [])
        if len(set(header)) != len(header):
            raise DatasetError(f"{path}: the header names a column twice: {', '.join(header)}")
        if not all(is_utf8(name) for name in header):
            raise DatasetError(f"{path}: the header is not valid UTF-8")
        while True:
            line = lines.begin_row()
            error: str | None
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as problem:
                error = f"not valid CSV: {problem}"
            else:
                if not cells:
                    continue
                error = _problem_of_cells(cells, header)
            if error is None:
                yield Record(line, {name: cell or None for name, cell in zip(header, cells, strict=True)})
                continue
            if lines.give_back():
                error = f"not valid CSV: a quote that opens on line {line} is never closed"
            raw = "".join(lines.taken).rstrip("\r\n").encode("utf-8", "surrogateescape")
            yield Record(line, {}, raw, error)


_NEXT_QUOTE = re.compile(r'(?:^|([^"]))(?:"")*"(?!")')
"""The first quote that is no half of an escaped one; the group is the character before it and quotes that touch it."""
_BEFORE_CELL = (None, ",", "\r", "\n")


class _Lines:
    """The lines of a CSV file. A quote that is never closed takes the rows after it; they can be given back."""

    def __init__(self, text: Iterator[str]) -> None:
        self._text = text
        self._given_back: deque[str] = deque()
        self._before = 0
        self._cut = False
        self.taken: list[str] = []
        """The lines of the row at hand."""

    def begin_row(self) -> int:
        """Forget the lines of the row before, and return the number of the next one."""
        self._before += len(self.taken)
        self._cut = False
        self.taken.clear()
        return self._before + 1

    def give_back(self) -> bool:
        """Give all but the first line back if that one left a quote open, and say whether it did."""
        later = self.taken[1:]
        quote = _NEXT_QUOTE.search("".join(later))
        # Of a cell that is closed, the next quote ends it, after text; else it opens another cell, after a comma.
        if not self._cut and (quote is None or quote[1] not in _BEFORE_CELL):
            return False
        self._given_back.extendleft(reversed(later))
        del self.taken[1:]
        return True

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = self._given_back.popleft() if self._given_back else next(self._text, None)
        self._cut = line is None or len(self.taken) == MAX_ROW_LINES
        if line is None:
            raise StopIteration
        if self._cut:
            self._given_back.appendleft(line)
            raise csv.Error(f"a row of more than {MAX_ROW_LINES} lines")
        self.taken.append(line)
        return line


def _problem_of_cells(cells: list[str], header: list[str]) -> str | None:
    if len(cells) != len(header):
        return f"{len(cells)} cells, and the header has {len(header)}"
    wrong = next((name for name, cell in zip(header, cells, strict=True) if not is_utf8(cell)), None)
    return wrong and f"the column {wrong!r} is not valid UTF-8"


def read_parquet(path: Path) -> Iterator[Record]:
    """Yield one record per row of a Parquet file."""
    file = _parquet_file(path)
    names = file.schema_arrow.names
    number = 0
    for batch in file.iter_batches(PARQUET_BATCH_ROWS):
        for i, cells in enumerate(zip(*map(_plain, batch.columns), strict=True)):
            number += 1
            values = dict(zip(names, cells, strict=True))
            bad = [name for name, cell in values.items() if isinstance(cell, _Unreadable)]
            if bad:
                raw = json.dumps(values, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
                yield Record(number, {}, raw, f"the column {bad[0]!r} cannot be read: {values[bad[0]].reason}")
            else:
                yield Record(number, values, batch=(batch, i))


@dataclass(frozen=True)
class _Unreadable:
    """A cell of which no value can be made."""

    reason: str

    def __str__(self) -> str:
        return f"unreadable: {self.reason}"


def _plain(column: pa.Array[Any]) -> list[Any]:
    """Return an Arrow column as Python values."""
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError):
        return [_plain_cell(cell) for cell in column]


def _plain_cell(cell: pa.Scalar[Any]) -> Any:
    """Return one value; as text where Python has none, such as dates after the year 9999."""
    try:
        return cell.as_py()
    except (ValueError, OverflowError) as error:
        try:
            return cell.cast("string").as_py()
        except Exception:  # text that is no UTF-8, lists of such dates
            return _Unreadable(" ".join(str(error).split()))


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
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
    except Exception as error:
        raise DatasetError(f"{path} is not a readable Parquet file: {' '.join(str(error).split())}") from error
    if len(set(names)) != len(names):
        raise DatasetError(f"{path} names a column twice: {', '.join(names)}")
    return file


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    return io.BufferedReader(_ZstdFile(path)) if suffix == ".zst" else path.open("rb")


class _ZstdFile(io.RawIOBase):
    """Reads a Zstandard file of any number of frames; zstandard's own reader takes one that is cut off for whole."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise MissingDependencyError("zstandard", "zstd", f"reading {path.name}") from error
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._file = path.open("rb")
        self._frame: Any = None
        self._packed, self._plain = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            self._packed = self._packed or self._file.read(4096)
            if not self._packed and self._frame is not None:
                raise EOFError("it ends in the middle of a frame")
            if not self._packed:
                return 0
            self._frame = self._frame or self._new_frame()
            self._plain, self._packed = memoryview(self._frame.decompress(self._packed)), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._plain))
        buffer[:size], self._plain = self._plain[:size], self._plain[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


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
            yield Row(index, str(file), record.line, record.values, record.raw, record.error, record.batch)

    def scan(self, template: list[str] | None = None) -> Scan:
        """Look through all rows once.

        Args:
            template: The columns of the prompt template, where there is one; else a prompt or messages are needed.

        Raises:
            DatasetError: a file is damaged, ids are not unique, or a column that every row needs is not there.
        """
        columns: dict[str, dict[str, None]] = {}
        for file, reader in self._readers:
            if reader is read_parquet:
                schema = _parquet_file(file).schema_arrow
                columns[str(file)] = dict.fromkeys(schema.names)
                self._check_types(file, schema, template)
        id_hashes = array("q")
        unreadable = 0
        for row in self.rows():
            unreadable += row.error is not None
            id_hashes.append(hash(str(row.id(self.columns.id))))
            if row.error is None:
                columns.setdefault(row.file, {}).update(dict.fromkeys(row.values))
        for name, found in columns.items():
            self._check_columns(name, list(found), template)
        self._check_ids(np.array(id_hashes, np.int64))
        every = dict.fromkeys(name for found in columns.values() for name in found)
        return Scan(len(id_hashes), unreadable, list(every), self.digest())

    def _check_types(self, file: Path, schema: pa.Schema, template: list[str] | None) -> None:
        allowed = {"id": "text or integers", "messages": "lists or JSON text", "sampling": "structs or JSON text"}
        if template is None:
            allowed["prompt"] = "text"
        types = {field.name: field.type for field in schema}
        for key, what in allowed.items():
            name = getattr(self.columns, key)
            if name in types and not _fits(types[name], what):
                raise DatasetError(
                    f"the column {name!r} of {file} is {types[name]}, and must be {what}; name another with "
                    f"dataset.columns.{key}=. There are: {', '.join(f'{n} ({kind})' for n, kind in types.items())}"
                )

    def _check_columns(self, file: str, columns: list[str], template: list[str] | None) -> None:
        default = ColumnsConfig()
        named = [name for key, name in vars(self.columns).items() if name != getattr(default, key)]
        for name in [*(template or []), *named]:
            if name not in columns:
                raise DatasetError(f"{file} has no column {name!r}; it has: {', '.join(columns)}")
        if template is None and self.columns.prompt not in columns and self.columns.messages not in columns:
            raise DatasetError(
                f"{file} has neither a column {self.columns.prompt!r} nor {self.columns.messages!r}; it has: "
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

    def digest(self) -> str:
        """Return a digest of all files.

        Raises:
            DatasetError: a file cannot be read.
        """
        digest = hashlib.sha256()
        for file in self.files:
            try:
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
            except OSError as error:
                raise DatasetError(f"{file} cannot be read: {error.strerror or error}") from error
        return f"sha256:{digest.hexdigest()[:32]}"


def _fits(kind: pa.DataType, what: str) -> bool:
    """Say whether an Arrow type is one of those that `what` names; a column of nulls fits everywhere."""
    import pyarrow as pa

    types = pa.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    fits = types.is_null(kind) or types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    fits |= "integers" in what and types.is_integer(kind)
    fits |= "lists" in what and (types.is_list(kind) or types.is_large_list(kind))
    return fits or ("structs" in what and types.is_struct(kind))


def _expand(path: str) -> list[Path]:
    if any(character in path for character in "*?[") and not Path(path).exists():
        pattern = str(Path(path).expanduser())
        found = sorted(file for file in map(Path, glob.glob(pattern, recursive=True)) if file.is_file())
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
    plain = file.with_suffix("") if file.suffix.lower() in COMPRESSIONS else file
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
    except Exception as error:  # gzip, zstandard and pyarrow each have errors of their own for a damaged file
        raise DatasetError(f"{file} cannot be read to its end: {' '.join(str(error).split())}") from error

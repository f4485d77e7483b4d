"""The rows of a dataset's files, in order, and one look through all of them before a run begins."""

from __future__ import annotations

import glob
import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmpipe.config import ColumnsConfig, DatasetConfig
from llmpipe.datasets.compression import COMPRESSIONS
from llmpipe.datasets.csv import read_csv
from llmpipe.datasets.jsonl import read_jsonl
from llmpipe.datasets.parquet import fits, parquet_file, read_parquet
from llmpipe.exceptions import DatasetError, MissingDependencyError
from llmpipe.records import Row

if TYPE_CHECKING:
    import pyarrow as pa

READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


@dataclass(frozen=True)
class Scan:
    """What one look through the whole dataset found."""

    rows: int
    columns: list[str]
    digest: str


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
        rows = chain.from_iterable(_guarded(file, reader) for file, reader in self._readers)
        for index, row in enumerate(islice(rows, self._limit)):
            row.index = index
            yield row

    def scan(self, template: list[str] | None = None, look: Callable[[Row], None] | None = None) -> Scan:
        """Look through all rows once.

        Args:
            template: The columns of the prompt template, where there is one; else a prompt or messages are needed.
            look: Called with each row, for what else wants to see them all.

        Raises:
            DatasetError: a file is damaged, ids are not unique, or a column that every row needs is not there.
        """
        columns: dict[str, dict[str, None]] = {}
        for file, reader in self._readers:
            if reader is read_parquet:
                schema = parquet_file(file).schema_arrow
                columns[str(file)] = dict.fromkeys(schema.names)
                self._check_types(file, schema, template)
        id_hashes = array("q")
        for row in self.rows():
            id_hashes.append(hash(str(row.id(self.columns.id))))
            if row.error is None and not row.values.keys() <= (known := columns.setdefault(row.file, {})).keys():
                known |= dict.fromkeys(row.values)
            if look is not None:
                look(row)
        for name, found in columns.items():
            self._check_columns(name, list(found), template)
        self._check_ids(np.asarray(id_hashes))
        every = dict.fromkeys(name for found in columns.values() for name in found)
        return Scan(len(id_hashes), list(every), self.digest())

    def _check_types(self, file: Path, schema: pa.Schema, template: list[str] | None) -> None:
        allowed = {"id": "text or integers", "messages": "lists or JSON text", "sampling": "structs or JSON text"}
        allowed |= {"tools": "lists or JSON text", "chat_template_kwargs": "structs or JSON text"}
        if template is None:
            allowed["prompt"] = "text"
        types = {field.name: field.type for field in schema}
        for key, what in allowed.items():
            name = getattr(self.columns, key)
            if name in types and not fits(types[name], what):
                raise DatasetError(
                    f"the column {name!r} of {file} is {types[name]}, and must be {what}; name another with "
                    f"dataset.columns.{key}=. There are: {', '.join(f'{n} ({kind})' for n, kind in types.items())}"
                )

    def _check_columns(self, file: str, columns: list[str], template: list[str] | None) -> None:
        default = ColumnsConfig()
        named = [name for key, name in vars(self.columns).items() if name not in (None, getattr(default, key))]
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


def _reader(file: Path) -> Callable[[Path], Iterator[Row]]:
    plain = file.with_suffix("") if file.suffix.lower() in COMPRESSIONS else file
    reader = READERS.get(plain.suffix.lower())
    if reader is None or (reader is read_parquet and plain is not file):
        raise DatasetError(
            f"{file.name} is of no known type; there are {', '.join(READERS)}, the text ones also with .gz or .zst"
        )
    return reader


def _guarded(file: Path, reader: Callable[[Path], Iterator[Row]]) -> Iterator[Row]:
    """Read a file; a fault of the file as a whole names the file."""
    try:
        yield from reader(file)
    except (DatasetError, MissingDependencyError):
        raise
    except Exception as error:  # gzip, zstandard and pyarrow each have errors of their own for a damaged file
        raise DatasetError(f"{file} cannot be read to its end: {' '.join(str(error).split())}") from error

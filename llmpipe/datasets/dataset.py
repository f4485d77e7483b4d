"""The rows of a dataset's files, in order, and one look through all of them before a run begins."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmpipe.config import ColumnsConfig, DatasetConfig
from llmpipe.datasets.contents import Contents, FileContent, changed, digest_of
from llmpipe.datasets.formats import Reader, reader_of
from llmpipe.datasets.inputs import Inputs
from llmpipe.datasets.parquet import fits, parquet_file, read_parquet, type_of
from llmpipe.datasets.partitions import with_columns
from llmpipe.datasets.shuffle import Positions, permutation, rows_at
from llmpipe.datasets.sources import Source, sources_of
from llmpipe.exceptions import DatasetError, LLMError, one_line
from llmpipe.quoting import listed, quoted, shortened
from llmpipe.records import Row
from llmpipe.sharegpt import CONVERSATIONS

if TYPE_CHECKING:
    import pyarrow as pa


MAX_COLUMNS = 2**17
"""How many names of columns are held, those aside that are asked about."""


@dataclass(frozen=True)
class Scan:
    """What one look through the whole dataset found."""

    rows: int
    columns: list[str]
    """Columns of the rows; where there are more than `MAX_COLUMNS`, those that were asked about and some others."""
    contents: list[FileContent]
    """Digests of the rows, file by file."""
    earlier: list[FileContent] | None = None
    """The same of the first rows alone, as many as an earlier run had; None where there are fewer now."""

    @property
    def digest(self) -> str:
        """A digest of what the rows hold, whatever their files are called, packed with or written as."""
        return digest_of(self.contents)


class Dataset:
    """The rows of one or several files, in order, read anew at every pass; once scanned, they are those of the scan.

    Args:
        config: Which rows.
        inputs: Keeps what can be read only once; by default for as long as the dataset is there.

    Raises:
        DatasetError: a file does not exist or is of no known type.
    """

    def __init__(self, config: DatasetConfig, inputs: Inputs | None = None) -> None:
        self.columns: ColumnsConfig = config.columns
        self._config = config
        self._inputs = inputs or Inputs()
        self._sources = [
            source
            for number, path in enumerate(config.paths)
            for source in sources_of(path, self._inputs.copy_of(path, number))
        ]
        self.files = [source.path for source in self._sources]
        self._readers = [_reader(source, config) for source in self._sources]
        self._shuffled: Positions | None = None
        self._rows_in: dict[int, int] = {}
        """How many rows there were in each file that was read to its end."""
        self._scanned: Contents | None = None

    def rows(self) -> Iterator[Row]:
        """Yield every row up to the limit; memory does not grow with the dataset.

        Raises:
            DatasetError: a file ends in the middle, cannot be read on, or is not any more what was scanned.
        """
        return self._read() if self._scanned is None else chain.from_iterable(self.blocks())

    def blocks(self) -> Iterator[list[Row]]:
        """Yield the rows of a dataset that was scanned, in blocks; each is first seen to be what was scanned.

        Raises:
            DatasetError: as `rows`.
        """
        assert self._scanned is not None
        return self._scanned.compare(self._read())

    def _read(self) -> Iterator[Row]:
        first, limit = self._config.offset, self._config.limit
        last = None if limit is None else first + limit
        if self._config.shuffle is not None:
            if self._shuffled is None:
                self._shuffled = permutation(sum(1 for _ in self._all()), self._config.shuffle)
            rows = rows_at(self._shuffled[first:last], self._all)
        else:
            rows = islice(self._all(), first, last)
        for index, row in enumerate(rows):
            row.index = index
            if first and row.position is None:
                row.position = first + index
            yield row

    def _all(self) -> Iterator[Row]:
        """Yield the rows of all files, in their order; of one that was read to its end before, as many as then."""
        for number, (source, reader) in enumerate(zip(self._sources, self._readers, strict=True)):
            rows = 0
            for row in islice(_rows_of(source, reader), self._rows_in.get(number)):
                rows += 1
                yield row
            if rows < (before := self._rows_in.setdefault(number, rows)):
                raise changed(source.path, f"it has {rows} of its {before} rows")

    def scan(
        self,
        template: list[str] | None = None,
        look: Callable[[Row], None] | None = None,
        earlier: int | None = None,
        also: Iterable[str] = (),
    ) -> Scan:
        """Look through all rows once; whatever is read of them from then on is compared with what is seen here.

        Args:
            template: The columns of the prompt template, where there is one; else a prompt or messages are needed.
            look: Called with each row, for what else wants to see them all.
            earlier: Of how many rows, from the first one on, the contents are wanted too.
            also: Further columns of which it matters whether they are there.

        Raises:
            DatasetError: a file is damaged, ids are not unique, or a column that every row needs is not there.
        """
        columns: dict[str, dict[str, None]] = {}
        asked = {*vars(self.columns).values(), *vars(ColumnsConfig()).values(), CONVERSATIONS, *(template or []), *also}
        room = MAX_COLUMNS
        paths = [name for name in self._named(template) if "." in name]
        for source, reader in zip(self._sources, self._readers, strict=True):
            if getattr(reader, "func", None) is read_parquet:
                schema = parquet_file(source.path).schema_arrow
                inner = [path for path in paths if type_of(schema, path) is not None]
                columns[str(source.path)] = dict.fromkeys([*schema.names, *source.columns, *inner])
                self._check_types(source.path, schema, template)
        id_hashes = array("q")
        contents = Contents(None if self._config.shuffle is None else self._name(), earlier)
        for row in chain.from_iterable(contents.note(self._read())):
            id_hashes.append(hash(str(row.id(self.columns.id))))
            if row.error is None and not row.values.keys() <= (known := columns.setdefault(row.file, {})).keys():
                new = [name for name in row.values if name not in known and (room > 0 or name in asked)]
                known |= dict.fromkeys(new)
                room -= len(new)
            for path in paths:
                if path not in columns.get(row.file, {}) and row.value(path) is not None:
                    columns[row.file][path] = None
            if look is not None:
                look(row)
        self._scanned = contents
        for name, found in columns.items():
            self._check_columns(name, list(found), template)
        self._check_ids(np.asarray(id_hashes))
        every = dict.fromkeys(name for found in columns.values() for name in found)
        return Scan(len(id_hashes), list(every), contents.files(), contents.marked)

    def _check_types(self, file: Path, schema: pa.Schema, template: list[str] | None) -> None:
        allowed = {
            "id": "text, numbers, dates or UUIDs",
            "messages": "lists or JSON text",
            "tools": "lists or JSON text",
            "chat_template_kwargs": "structs or JSON text",
            "sampling": "structs or JSON text",
        }
        if template is None:
            allowed["prompt"] = "text"
        for key, what in allowed.items():
            name = getattr(self.columns, key)
            kind = type_of(schema, name)
            if kind is not None and not fits(kind, what):
                raise DatasetError(
                    f"the column {quoted(name)} of {file} is {shortened(str(kind))}, and must be {what}; name another "
                    f"with dataset.columns.{key}=. There are: {listed(f'{f.name} ({f.type})' for f in schema)}"
                )

    def _named(self, template: list[str] | None) -> list[str]:
        """Return the columns that are asked for by name."""
        default = ColumnsConfig()
        named = [name for key, name in vars(self.columns).items() if name not in (None, getattr(default, key))]
        return [*(template or []), *named]

    def _check_columns(self, file: str, columns: list[str], template: list[str] | None) -> None:
        for name in self._named(template):
            if name not in columns:
                raise DatasetError(f"{file} has no column {quoted(name)}; it has: {listed(columns)}")
        prompts = {self.columns.prompt, self.columns.messages, CONVERSATIONS}
        if template is None and not prompts & set(columns):
            raise DatasetError(
                f"{file} has neither a column {self.columns.prompt!r} nor {self.columns.messages!r}; it has: "
                f"{listed(columns)}. Name one with dataset.columns.prompt= or dataset.columns.messages="
                f"{self._hint(file)}"
            )

    def _hint(self, file: str) -> str:
        """Return what to name where the first row has it, but inside of another column."""
        row = next((row for row in self.rows() if row.file == file and row.error is None), None)
        for name, value in row.values.items() if row else []:
            for key in ("messages", "prompt"):
                path = f"{name}.{getattr(self.columns, key)}"
                if isinstance(value, dict) and row is not None and row.value(path) is not None:
                    return f", for instance dataset.columns.{key}={path}"
        return ""

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
                        f"the id {quoted(name)} stands twice: {first.file} line {first.line} and {row.file} line "
                        f"{row.line}; make ids unique, name another column with dataset.columns.id=, or name rows by "
                        f"position with dataset.columns.id=null, as where each file counts from the beginning"
                    )
                seen[name] = row

    def _name(self) -> str:
        """Return what to call the files together."""
        others = f" or another of the {len(self.files)} files" if len(self.files) > 1 else ""
        return f"{self.files[0]}{others}"


def _reader(source: Source, config: DatasetConfig) -> Reader:
    with _faults_named(source.path):
        return reader_of(source.path, config, source.streamed)


def _rows_of(source: Source, reader: Reader) -> Iterator[Row]:
    with _faults_named(source.path):
        rows = reader(source.path)
        yield from with_columns(rows, source.columns) if source.columns else rows


@contextmanager
def _faults_named(file: Path) -> Iterator[None]:
    """Name the file in what is wrong with a file as a whole."""
    try:
        yield
    except (LLMError, GeneratorExit):
        raise
    except Exception as error:  # gzip, zstandard and pyarrow each have errors of their own for a damaged file
        raise DatasetError(f"{file} cannot be read to its end: {one_line(error)}") from error

"""Which format a file has: told by what it holds, then by its name, unless `dataset.format` says it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from llmpipe.config import DatasetConfig
from llmpipe.datasets.csv import read_csv
from llmpipe.datasets.json import HEAD_BYTES, field_of, has_a_row_on_a_line, has_no_end, holds_lines, read_json
from llmpipe.datasets.jsonl import read_jsonl
from llmpipe.datasets.opening import COMPRESSIONS, open_bytes
from llmpipe.datasets.parquet import read_parquet
from llmpipe.exceptions import DatasetError, LLMConfigError
from llmpipe.records import Row

log = logging.getLogger(__name__)

Reader = Callable[[Path], Iterator[Row]]
READERS: dict[str, Callable[[Path, DatasetConfig], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".json": read_json,
    ".tsv": read_csv,
}
_PARQUET = b"PAR1"
_FOREIGN = {
    b"PK\x03\x04": "a spreadsheet or another zip archive: save it as CSV, or unpack it",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet: save it as CSV",
    b"BZh": "packed with bzip2: pack it with gzip or zstd, or unpack it",
    b"\xfd7zXZ": "packed with xz: pack it with gzip or zstd, or unpack it",
    b"ARROW1": "an Arrow file: write it as Parquet",
    b"\xff\xff\xff\xff": "an Arrow stream: write it as Parquet",
    b"ORC": "an ORC file: write it as Parquet",
    b"Obj\x01": "an Avro file: write it as Parquet",
    b"SQLite format 3": "a database: write its rows as JSONL or Parquet",
}


def suffix_of(file: Path) -> str:
    """Return the end of a file's name that tells its format, what it is packed with aside."""
    return (file.with_suffix("") if file.suffix.lower() in COMPRESSIONS else file).suffix.lower()


def reader_of(file: Path, config: DatasetConfig, streamed: bool = False) -> Reader:
    """Return what reads a file.

    Args:
        file: The file.
        config: Says the format, if it says it, and what readers go by.
        streamed: Whether the file came without a name, so that there is only its content.

    Raises:
        DatasetError: it is of no known type.
        LLMConfigError: `dataset.format` is unknown, or `dataset.field` is set for what is not JSON.
    """
    suffix = suffix_of(file) if config.format == "auto" else f".{config.format}"
    if config.format != "auto" and suffix not in READERS:
        known = ", ".join(name[1:] for name in READERS)
        raise LLMConfigError(f"dataset.format={config.format!r} is not allowed; it must be auto or one of {known}")
    with file.open("rb") as stream:
        start = stream.read(16)
    if config.format == "auto":
        foreign = next((what for magic, what in _FOREIGN.items() if start.startswith(magic)), None)
        if foreign is not None:
            raise DatasetError(f"{file} is {foreign}")
        if start.startswith(_PARQUET):
            suffix = ".parquet"
        elif suffix not in READERS or (suffix == ".parquet" and file.suffix.lower() in COMPRESSIONS):
            suffix = _told_by_content(file, ".csv" if streamed else None)
    reader = READERS[suffix]
    if reader in (read_jsonl, read_json) and config.format != "jsonl":
        return _json_reader(file, suffix, config)
    if config.field is not None:
        raise LLMConfigError(f"dataset.field={config.field!r} is for JSON files, and {file} is none")
    return partial(reader, config=config)  # type: ignore[call-arg]


def _told_by_content(file: Path, otherwise: str | None) -> str:
    with open_bytes(file) as stream:
        head = stream.read(2**16).lstrip(b" \t\r\n")
    if head.startswith((b"{", b"[")):
        return ".jsonl"
    if otherwise is None:
        raise DatasetError(
            f"{file.name} is of no known type; there are {', '.join(READERS)}, the text ones also packed with gzip or "
            f"zstd. If it is one of them, say so: dataset.format={'|'.join(name[1:] for name in READERS)}"
        )
    return otherwise


def _json_reader(file: Path, suffix: str, config: DatasetConfig) -> Reader:
    """Return what reads JSON by its layout: a row per line, or values of any other."""
    with open_bytes(file) as stream:
        head = stream.read(HEAD_BYTES)
    alone = suffix == ".json" and (b"\n" not in head.strip() or head.lstrip().startswith(b"["))
    if config.field is None and not alone and holds_lines(head, whole=len(head) < HEAD_BYTES):
        return partial(read_jsonl, config=config)
    if config.field is None and suffix != ".json" and has_a_row_on_a_line(head) and has_no_end(file, config):
        return partial(read_jsonl, config=config)  # the first line is damaged, or nothing could be read
    field = field_of(file, config)
    if field is not None and field != config.field:
        log.info("%s: its rows are the list %r", file, field)
    elif suffix != ".json":
        log.info("%s is read as JSON values; it does not hold a row on each line", file)
    return partial(read_json, config=replace(config, field=field))

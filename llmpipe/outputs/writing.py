"""Rows and their completions → the files of a run directory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import IO, Any, Protocol

import orjson

from llmpipe.config import OutputConfig, check
from llmpipe.outputs.arrow_types import ColumnTypes
from llmpipe.outputs.jsonl import JsonlWriter, dump_json
from llmpipe.outputs.layout import Answered, Layout
from llmpipe.outputs.parquet import ParquetWriter

METRICS_FILE = "metrics.json"
ERRORS_FILE = "errors.jsonl"
REPORT_FILE = "report.html"


class Writer(Protocol):
    """What a format has to do."""

    needs_types: bool
    """Whether it must know the types of the rows' own columns before the first row is written."""

    def __init__(self, file: IO[bytes], layout: Layout, types: ColumnTypes | None) -> None:
        """Begin a file; `types`, where they are needed, have seen every row."""

    def write(self, answered: Answered) -> None:
        """Append one output row."""

    def finish(self) -> None:
        """Write what is still held."""


WRITERS: dict[str, type[Writer]] = {"jsonl": JsonlWriter, "parquet": ParquetWriter}


def writer_of(config: OutputConfig) -> type[Writer]:
    """Return what writes the answers.

    Raises:
        LLMConfigError: there is no such format.
    """
    check(config.format in WRITERS, "output.format", config.format, f"one of {', '.join(WRITERS)}")
    return WRITERS[config.format]


def column_types(config: OutputConfig) -> ColumnTypes | None:
    """Return the object that has to see every row before answers are written; None where the format needs none.

    Raises:
        LLMConfigError: there is no such format.
        MissingDependencyError: the format needs a package that is not installed.
    """
    return ColumnTypes() if writer_of(config).needs_types else None


def output_file(config: OutputConfig) -> str:
    """Return the name of the file with a run's answers."""
    return f"outputs.{config.format}"


def output_files(config: OutputConfig) -> tuple[str, ...]:
    """Return the names of the files that a run ends with."""
    return output_file(config), ERRORS_FILE, METRICS_FILE, REPORT_FILE


def write_answers(
    files: Mapping[str, IO[bytes]],
    config: OutputConfig,
    layout: Layout,
    types: ColumnTypes | None,
    answered: Iterable[Answered],
) -> None:
    """Write the answers, and the rows that failed to `errors.jsonl`.

    Args:
        files: The open files by name.
        config: Format of the answers.
        layout: Columns to add.
        types: The types of the rows' own columns, where the format needs them.
        answered: Every output row, in order; read once.
    """
    writer = writer_of(config)(files[output_file(config)], layout, types)
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
    files[METRICS_FILE].write(json_text(metrics))


def json_text(content: dict[str, Any]) -> bytes:
    """Return the text of a JSON file for people to read."""
    try:
        return orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n"
    except TypeError:  # it names a file whose name is no UTF-8, which only an escape can hold
        return json.dumps(content, indent=2).encode("ascii") + b"\n"

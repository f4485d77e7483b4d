"""Rows and their completions → the files of a run directory, in input order, whole or not at all.

A row's own columns come out as they went in. To add a format: write a class like `JsonlWriter` in a file of its own and
name it in `WRITERS`.

layout.py       the columns that are added, and their values
writing.py      the files of a run, and what writes each format
jsonl.py        JSON Lines
parquet.py      Parquet
arrow_types.py  the Arrow types that hold all values of the columns
own.py          files that are written again and again, as an export is
reading.py      a run directory → data frames
"""

from llmpipe.outputs.arrow_types import ColumnTypes
from llmpipe.outputs.layout import COLUMNS, ID, POSITION, Answered, Layout, all_names, join, layout_of
from llmpipe.outputs.own import is_same, own_file, refuse_foreign
from llmpipe.outputs.reading import RunFiles, read_run
from llmpipe.outputs.writing import (
    ERRORS_FILE,
    METRICS_FILE,
    REPORT_FILE,
    WRITERS,
    column_types,
    json_text,
    output_file,
    output_files,
    write_answers,
    write_metrics,
    writer_of,
)
from llmpipe.system.files import found_files, new_files, seal

__all__ = [
    "COLUMNS",
    "ERRORS_FILE",
    "ID",
    "METRICS_FILE",
    "POSITION",
    "REPORT_FILE",
    "WRITERS",
    "Answered",
    "ColumnTypes",
    "Layout",
    "RunFiles",
    "all_names",
    "column_types",
    "found_files",
    "is_same",
    "join",
    "json_text",
    "layout_of",
    "new_files",
    "output_file",
    "output_files",
    "own_file",
    "read_run",
    "refuse_foreign",
    "seal",
    "write_answers",
    "write_metrics",
    "writer_of",
]

"""JSONL: a JSON object per line, read exactly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from llmpipe.cells import MAX_LEVELS, is_too_deep
from llmpipe.config import DatasetConfig
from llmpipe.datasets.opening import blocks_of_lines, open_bytes
from llmpipe.records import Row
from llmpipe.text import is_utf8

KEPT_BYTES = 1000
"""What is kept of a row that is too large."""
LONG_NUMBER = 19
"""Digits from which a number may exceed 64 bits, beyond which orjson rounds integers to floats."""

DEFAULTS = DatasetConfig()
"""What a reader goes by that is told nothing."""
_BLANKS = b" \t\r\n"
_DIGITS_TO_ZEROS = bytes(ord("0") if chr(i).isdecimal() and i < 128 else ord(" ") for i in range(256))


def read_jsonl(path: Path, config: DatasetConfig = DEFAULTS) -> Iterator[Row]:
    """Yield one row per line that is not blank; lines end with LF or CRLF and nothing else."""
    name, before, most = str(path), 0, config.max_row_bytes
    with open_bytes(path) as file:
        for lines in blocks_of_lines(file, most):  # looked at together: most are easy
            easy = not _has_long_number(b" ".join(lines))
            for number, line in enumerate(lines, before + 1):
                if len(line) > most:
                    yield too_large(name, number, line, config)
                    continue
                text = line.strip(_BLANKS)
                try:
                    values = orjson.loads(text) if easy else None
                except orjson.JSONDecodeError:  # blank, wrong, or only for the standard library
                    values = None
                if type(values) is dict and not is_too_deep(values, text):
                    yield Row(name, number, values, text)
                elif text:
                    yield row_of(name, number, text, indent=len(line) - len(line.lstrip(_BLANKS)))
            before += len(lines)


def too_large(name: str, number: int, beginning: bytes, config: DatasetConfig) -> Row:
    """Return the error row in place of one that is larger than a row may be."""
    error = f"larger than the {config.max_row_mb:g} MB that a row may have (dataset.max_row_mb=)"
    return Row(name, number, {}, beginning[:KEPT_BYTES], error)


def row_of(name: str, number: int, text: bytes, indent: int = 0) -> Row:
    """Return the row that JSON text is, which may be an error row; before it, so many blanks stand on its line."""
    try:
        values = parse_json(text)
    except json.JSONDecodeError as error:
        return Row(name, number, {}, text, f"not valid JSON at column {indent + error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:
        return Row(name, number, {}, text, f"not valid JSON: {error}")
    problem = _problem(values, text)
    return Row(name, number, {} if problem else values, text, problem)


def _problem(values: Any, text: bytes) -> str | None:
    """Say why a JSON value is no row, or None."""
    if not isinstance(values, dict):
        return f"a JSON {type(values).__name__}, not an object"
    if not all(is_utf8(name) for name in values):
        return "a column's name holds a lone surrogate, which no UTF-8 text can"
    if is_too_deep(values, text):
        return f"nested more than {MAX_LEVELS} levels deep"
    return None


def parse_json(text: bytes) -> Any:
    """Parse JSON exactly: integers of any size, NaN and Infinity, lone surrogates.

    Raises:
        ValueError: the text is not JSON, or not UTF-8.
        RecursionError: it is nested too deeply.
    """
    if not _has_long_number(text):
        try:
            return orjson.loads(text)  # ten times faster
        except orjson.JSONDecodeError:
            pass  # perhaps one of the things that only the standard library reads
    return json.loads(text.decode("utf-8"))


def _has_long_number(text: bytes) -> bool:
    # As fast as the memory; a regular expression would take as long as the parsing.
    return b"0" * LONG_NUMBER in text.translate(_DIGITS_TO_ZEROS)

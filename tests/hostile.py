"""Datasets as they come: what a row may hold that no row should, in each format, with what is said about it.

A bad row is its text (JSONL, CSV) or its cells (Parquet), and a part of the reason that its error row has to give.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

CHAT = [{"role": "user", "content": "hi"}]


class Bad(NamedTuple):
    """A row that cannot be run, and a part of the reason."""

    row: Any
    reason: str


class Dataset(NamedTuple):
    """A file, and line and reason of each error row in it."""

    path: Path
    errors: list[tuple[int, str]]


def good_rows(count: int) -> list[dict[str, Any]]:
    """Rows that hold what is unusual and allowed."""
    odd = ["plain", "é😀", "a\u2028b\u2029c\x85", "nul \0", 'say "hi", he said', "tab\tand\r\nlines", "=1+1", "{x}"]
    return [{"id": f"good {i}", "prompt": odd[i % len(odd)], "note": odd[-i % len(odd)]} for i in range(count)]


# --- JSONL ------------------------------------------------------------------------------------------------------------

JSONL = [
    Bad(b"{bad", "not valid JSON at column 2"),
    Bad(b'  {"prompt": "x",}', "not valid JSON at column 18"),
    Bad(b'{"prompt": "x"', "not valid JSON at column 15"),
    Bad(b'{"prompt": "x"} {"prompt": "y"}', "not valid JSON at column 17"),
    Bad(b'{"prompt": "\xff"}', "utf-8"),
    Bad(b'\xff\xfe{\0"\0p\0', "utf-8"),
    Bad(b"\0\0\0", "not valid JSON at column 1"),
    Bad(b"[1]", "a JSON list, not an object"),
    Bad(b"null", "not an object"),
    Bad(b'{"\\ud800": 1}', "lone surrogate"),
    Bad(b'{"prompt": "\\ud800"}', "lone surrogate"),
    Bad(b'{"prompt": ' + b"[" * 300 + b"]" * 300 + b"}", "nested more than 200 levels deep"),
    Bad(b'{"prompt": ' + b"[" * 10**5, "not valid JSON"),
    Bad(b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}", "not valid JSON"),
    Bad(b"{}", "missing or null"),
    *(
        Bad(json.dumps(row).encode(), reason)
        for row, reason in [
            ({"prompt": None}, "missing or null"),
            ({"prompt": ""}, "empty"),
            ({"prompt": float("nan")}, "missing or null"),
            ({"prompt": ["x"]}, "a list, not text"),
            ({"messages": []}, "an empty list"),
            ({"messages": "x"}, "not valid JSON"),
            ({"messages": [{"role": "alien", "content": "x"}]}, "role 'alien'"),
            ({"messages": [{"role": "user"}]}, "null as content"),
            ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogate"),
            ({"prompt": "x", "sampling": {"temperature": -1}}, "[0, 100]"),
            ({"prompt": "x", "sampling": {"max_tokens": 1e999}}, "max_tokens"),
            ({"prompt": "x", "sampling": {"top_q": 1}}, "unknown sampling option 'top_q'"),
            ({"prompt": "x", "sampling": [1]}, "a list, not an object"),
        ]
    ),
]


def write_jsonl(path: Path, good: Sequence[dict[str, Any]], bad: Sequence[Bad]) -> Dataset:
    """Write good and bad rows in turn, with a byte order mark, blank lines, and both kinds of line ends."""
    text, errors, line = b"\xef\xbb\xbf\n", [], 1
    for number, (row, wrong) in enumerate(zip_longest(good, bad)):
        if row is not None:
            line += 1
            text += json.dumps(row, ensure_ascii=bool(number % 2)).encode() + (b"\r\n" if number % 3 else b"\n")
        if wrong is not None:
            line += 2
            text += b" \t\n" + wrong.row + b"\n"
            errors.append((line, wrong.reason))
    path.write_bytes(text)
    return Dataset(path, errors)


# --- CSV --------------------------------------------------------------------------------------------------------------

CSV = [
    Bad(b'b,"never closed,n', "a quote that opens on line {line} is never closed"),
    Bad(b"b", "1 cells, and the header has 3"),
    Bad(b"b,x,n,more", "4 cells, and the header has 3"),
    Bad(b"b,caf\xe9,n", "the column 'prompt' is not valid UTF-8"),
    Bad(b'b,"x"y,n', "not valid CSV"),
    Bad(b'b,"two\nlines"y,n', "not valid CSV"),
    Bad(b'b,"two\nlines",n,more', "4 cells, and the header has 3"),
    Bad(b"b,,n", "missing or null"),
    Bad(b'b,"open, ""quoted""', "a quote that opens on line {line} is never closed"),
]


def write_csv(
    path: Path, good: Sequence[dict[str, Any]], bad: Sequence[Bad], quoting: int = csv.QUOTE_MINIMAL
) -> Dataset:
    """Write good and bad rows in turn."""
    text, errors = b"\xef\xbb\xbfid,prompt,note\r\n", []
    for row, wrong in zip_longest(good, bad):
        if row is not None:
            cells = io.StringIO(newline="")
            csv.writer(cells, quoting=quoting).writerow(row.values())  # type: ignore[arg-type]
            text += cells.getvalue().encode()
        if wrong is not None:
            line = len(text.splitlines()) + 1  # of bytes: at CR and LF only, as the reader has it
            errors.append((line, wrong.reason.format(line=line)))
            text += wrong.row + b"\n"
    path.write_bytes(text)
    return Dataset(path, errors)


# --- Parquet ----------------------------------------------------------------------------------------------------------

PARQUET = [
    Bad({"prompt": None}, "missing or null"),
    Bad({"prompt": b""}, "empty"),
    Bad({"prompt": b"caf\xe9"}, "the column 'prompt' cannot be read: 'utf-8'"),
    Bad({"prompt": b"x", "note": b"\xff"}, "the column 'note' cannot be read: 'utf-8'"),
    Bad({"messages": []}, "an empty list"),
    Bad({"messages": [{"role": "alien", "content": "x"}]}, "role 'alien'"),
    Bad({"messages": [None]}, "message 1 is null"),
    Bad({"prompt": b"x", "sampling": {"temperature": -1.0}}, "[0, 100]"),
]


def write_parquet(path: Path, good: Sequence[dict[str, Any]], bad: Sequence[Bad]) -> Dataset:
    """Write good and bad rows in turn; text columns hold the bytes they are given."""
    rows: list[dict[str, Any]] = []
    errors = []
    for row, wrong in zip_longest(good, bad):
        if row is not None:
            rows.append({name: cell.encode() for name, cell in row.items()})
        if wrong is not None:
            rows.append(wrong.row)
            errors.append((len(rows), wrong.reason))
    kinds = {
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "sampling": pa.struct({"temperature": pa.float64()}),
    }
    columns = {name: pa.array([row.get(name) for row in rows], kind) for name, kind in kinds.items()}
    texts = {name: _text([row.get(name) for row in rows]) for name in ("id", "prompt", "note")}
    pq.write_table(pa.table({**texts, **columns}), path, row_group_size=5)
    return Dataset(path, errors)


def _text(cells: list[bytes | None]) -> Any:
    """Return a text column of any bytes: Arrow does not look."""
    column = pa.array(cells, pa.binary())
    return pa.StringArray.from_buffers(len(cells), column.buffers()[1], column.buffers()[2], column.buffers()[0])


WRITERS: dict[str, tuple[Callable[..., Dataset], list[Bad]]] = {
    "jsonl": (write_jsonl, JSONL),
    "csv": (write_csv, CSV),
    "parquet": (write_parquet, PARQUET),
}

# --- anything ---------------------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**30, -(2**63), 2**64, 4096, 4097]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "user", "assistant", "\ud800", "\0", "\u2028", "[]", "{}"]),
)
OPTIONS = st.sampled_from(["temperature", "max_tokens", "stop", "n", "seed", "logit_bias", "top_k", "ignore_eos", "no"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(OPTIONS, st.sampled_from(["role", "content"]), st.text(max_size=4)), inner, max_size=3
        ),
    ),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({}, optional={"role": st.sampled_from(["user", "system", "x", None]), "content": VALUES}),
    max_size=2,
)
WILD_OBJECTS = st.fixed_dictionaries(
    {},
    optional={
        "prompt": VALUES,
        "messages": st.one_of(VALUES, MESSAGES),
        "sampling": st.one_of(VALUES, st.dictionaries(OPTIONS, VALUES, max_size=2)),
        "reference": VALUES,
        "note": VALUES,
    },
)
WILD_LINES = st.one_of(WILD_OBJECTS.map(lambda row: json.dumps(row).encode()), st.binary(max_size=30)).map(
    lambda line: line.replace(b"\n", b"")
)
ONE_LINE = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=6) | st.sampled_from(
    ["", '"', '""', ",", '","', '",', "x"]
)

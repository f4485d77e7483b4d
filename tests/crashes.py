"""Runs that are killed or fail, and what has to be true of them afterwards."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from faults import Children

TIMES = ["queue_s", "first_token_s", "latency_s"]
SIGKILL = -9


class Case:
    """One configuration, and what a run of it that nobody disturbed gives."""

    def __init__(
        self, children: Children, root: Path, dataset: list[bytes] | Path, *overrides: str, **job: Any
    ) -> None:
        self.children, self.root, self.job = children, root, job
        if isinstance(dataset, list):
            (root / "rows.jsonl").write_bytes(b"".join(row + b"\n" for row in dataset))
            dataset = root / "rows.jsonl"
        self.overrides = [*overrides, f"dataset.path={dataset}"]
        began = time.perf_counter()
        done = self.run(root / "whole")
        self.seconds = time.perf_counter() - began
        assert done["exit"] in (0, 3), done
        self.code, self.steps = done["exit"], done["steps"]
        self.expected = answers(root / "whole")
        assert len(set(names(root / "whole"))) == len(names(root / "whole")) == len(committed(root / "whole"))
        self._count = 0

    def run(self, directory: Path, **job: Any) -> dict[str, Any]:
        return self.children.run(directory, *self.overrides, **self.job, **job)

    def new_directory(self) -> Path:
        self._count += 1
        return self.root / f"run {self._count}"

    def check_end(self, directory: Path, known: dict[Any, bytes]) -> None:
        """Resume undisturbed; compare the end with an uninterrupted run, and the ledger with what it held before."""
        done = self.run(directory, resume=(directory / "ledger.sqlite").exists())
        assert done["exit"] == self.code, done
        assert answers(directory) == self.expected
        check_kept(directory, known)
        before = content(directory)
        assert self.run(directory)["exit"] == self.code
        assert content(directory) == before


def answers(directory: Path) -> Any:
    """Return the final answers without the columns of times: bytes of JSONL, the whole table of Parquet."""
    if (directory / "outputs.parquet").exists():
        return pq.read_table(directory / "outputs.parquet").drop_columns(TIMES)
    text = (directory / "outputs.jsonl").read_bytes()
    return re.sub(rb'"(%s)":[^,]*,' % "|".join(TIMES).encode(), b"", text)


def names(directory: Path) -> list[tuple[str, int]]:
    """Return the id and the sample of each answer."""
    if (directory / "outputs.parquet").exists():
        rows = pq.read_table(directory / "outputs.parquet").to_pylist()
    else:
        rows = [json.loads(line) for line in (directory / "outputs.jsonl").read_bytes().splitlines()]
    return [(row["id"], row.get("sample", 0)) for row in rows]


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.*") if path.name in OUTPUTS}


OUTPUTS = ("outputs.jsonl", "outputs.parquet", "errors.jsonl", "metrics.json", "report.html")


def committed(directory: Path) -> dict[tuple[int, int], bytes]:
    """Return what the ledger holds; it shows itself only to who takes part in its journal."""
    try:
        with sqlite3.connect(f"file:{directory / 'ledger.sqlite'}?mode=rw", uri=True) as db:
            return {
                (row, sample): data for row, sample, data in db.execute("SELECT row, sample, data FROM completions")
            }
    except sqlite3.OperationalError:  # not there yet, or not more than a beginning
        return {}


def check_kept(directory: Path, known: dict[Any, bytes]) -> dict[Any, bytes]:
    """Make sure that what was committed is there as it was, times included: neither lost nor done again."""
    now = committed(directory)
    assert {key: now.get(key) for key in known} == known
    return now


def small_rows(count: int = 12) -> list[bytes]:
    rows = [json.dumps({"id": f"row {i}", "prompt": f"say {i} é"}).encode() for i in range(count)]
    rows[count // 2] = b"{bad"
    return rows

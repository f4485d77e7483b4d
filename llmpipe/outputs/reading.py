"""A run directory → its rows and metrics, for a notebook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmpipe.exceptions import LLMError, MissingDependencyError
from llmpipe.outputs.arrow_types import AS_JSON
from llmpipe.outputs.writing import METRICS_FILE

if TYPE_CHECKING:
    import pandas as pd


class RunFiles(NamedTuple):
    """What a finished run left: `rows, metrics = read_run(directory)`."""

    rows: pd.DataFrame
    metrics: dict[str, Any]


def read_run(directory: str | Path) -> RunFiles:
    """Return a finished run's output rows as a DataFrame, and its metrics.

    Raises:
        LLMError: the directory holds no finished run.
        MissingDependencyError: pandas is not installed.
    """
    directory = Path(directory)
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingDependencyError("pandas", "pandas", "read_run") from error
    metrics = json.loads(_finished(directory, METRICS_FILE).read_bytes())
    path = _finished(directory, metrics["output"])
    if path.suffix == ".parquet":
        return RunFiles(_read_parquet(path), metrics)
    with path.open("rb") as lines:
        return RunFiles(pd.DataFrame([json.loads(line) for line in lines]), metrics)


def _finished(directory: Path, name: str) -> Path:
    path = directory / name
    if not path.is_file():
        raise LLMError(f"{directory} holds no finished run: there is no {name} in it")
    return path


def _read_parquet(path: Path) -> pd.DataFrame:
    """Read answers in Parquet; columns kept as JSON text become their values again."""
    import pandas as pd
    import pyarrow.parquet as pq

    rows = pd.read_parquet(path)
    for field in pq.read_schema(path):
        if (field.metadata or {}).items() >= AS_JSON.items():
            values = [json.loads(cell) if isinstance(cell, str) else None for cell in rows[field.name]]
            rows[field.name] = pd.Series(values, rows.index, dtype=object)
    return rows

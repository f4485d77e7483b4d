"""Which columns an output row gains, and how input rows and completions come together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmpipe.config import RunConfig
from llmpipe.exceptions import DatasetError, LLMError
from llmpipe.records import Completion, Row

ID, POSITION = "id", "row_id"
"""What the names of the rows are called; the second where the dataset has ids that are not to name its rows."""

COLUMNS = {
    "completion": "string",
    "finish_reason": "string",
    "prompt_tokens": "int64",
    "cached_prompt_tokens": "int64",
    "completion_tokens": "int64",
    "queue_s": "float64",
    "first_token_s": "float64",
    "latency_s": "float64",
    "error": "string",
}
"""The columns that every output row gains, with their Arrow types."""


@dataclass(frozen=True)
class Layout:
    """Which columns an output row gains, in order."""

    prefix: str
    id_column: str | None
    adds_id: bool
    """Whether the dataset lacks a column `id`, so that one is added."""
    sample: bool
    truncated: bool
    scorers: tuple[str, ...]
    id_name: str = ID
    """What the added column with the ids is called."""
    source: bool = False
    """Whether to say where the row stands in the dataset."""

    def types(self) -> dict[str, str]:
        """Return name → Arrow type of the added columns, prefix included."""
        names = {self.id_name: "string"} if self.adds_id else {}
        names |= {"source_file": "string", "source_line": "int64"} if self.source else {}
        names |= {"sample": "int64"} if self.sample else {}
        names |= COLUMNS
        names |= {"truncated_prompt_tokens": "int64"} if self.truncated else {}
        names |= {f"score_{name}": "float64" for name in self.scorers}
        return {self.prefix + name: kind for name, kind in names.items()}

    def values(self, row: Row, completion: Completion) -> list[Any]:
        """Return the added values of one output row, in the order of `types`."""
        values: list[Any] = [str(row.id(self.id_column))] if self.adds_id else []
        if self.source:
            values += [row.file, row.line]
        if self.sample:
            values.append(completion.sample)
        c = completion
        values += [c.text, c.finish_reason, c.prompt_tokens, c.cached_prompt_tokens, c.completion_tokens]
        values += [c.queue_s, c.first_token_s, c.latency_s, c.error]
        if self.truncated:
            values.append(c.truncated_prompt_tokens)
        return values + [c.scores.get(name) for name in self.scorers]

    def check(self, dataset_columns: Sequence[str]) -> None:
        """Refuse a dataset that already has a column that would be added.

        Raises:
            DatasetError: names the columns and the remedy.
        """
        there = set(dataset_columns)
        taken = [name for name in self.types() if name in there]
        if taken:
            raise DatasetError(
                f"the dataset already has the column {', '.join(map(repr, taken))} that llmpipe would add: "
                f"set output.prefix=, for instance output.prefix=llm_"
            )


def layout_of(config: RunConfig, dataset_columns: Sequence[str], samples: int) -> Layout:
    """Return the columns that the answers gain, for rows of at most so many samples.

    Raises:
        DatasetError: the dataset already has one of them; names the columns and the remedy.
    """
    columns, has_id = config.dataset.columns, ID in dataset_columns
    layout = Layout(
        prefix=config.output.prefix,
        id_column=columns.id,
        source=config.output.source,
        adds_id=columns.id != ID or not has_id,
        sample=samples > 1,
        truncated=config.prompt.overflow.value == "truncate",
        scorers=tuple(config.metrics.scorers) if columns.reference in dataset_columns else (),
        # Where rows are named by position, ids of their own ride along.
        id_name=POSITION if columns.id is None and has_id else ID,
    )
    layout.check(dataset_columns)
    return layout


def all_names(prefix: str, scorers: Iterable[str]) -> set[str]:
    """Return every column that any layout could add, or that decides what it adds."""
    widest = Layout(prefix, ID, adds_id=True, sample=True, truncated=True, scorers=tuple(scorers), source=True)
    return {ID, prefix + POSITION, *widest.types()}


class Answered(NamedTuple):
    """One output row: an input row and one of its completions."""

    row: Row
    completion: Completion


def join(rows: Iterable[Row], completions: Iterable[Completion]) -> Iterator[Answered]:
    """Bring rows and completions together; both must be in order.

    Raises:
        LLMError: a row has no completion.
    """
    source = iter(completions)
    completion = next(source, None)
    for row in rows:
        if completion is None or completion.request_id != row.index:
            raise LLMError(f"{row.file} line {row.line} has no answer in the ledger; resume the run")
        while completion is not None and completion.request_id == row.index:
            yield Answered(row, completion)
            completion = next(source, None)

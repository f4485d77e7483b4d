"""`export=RUN_DIR`: the answers that a run has so far, also while it goes on or after it was killed.

Reads the ledger as it is at one moment, without its lock, and writes the rows that are finished, in input order and
with the columns of the final output. The run, if there is one, does not notice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from llmpipe.config import OutputFormat, RunConfig
from llmpipe.datasets import Inputs
from llmpipe.exceptions import DatasetError, LLMConfigError, LLMError
from llmpipe.fingerprint import continued, fingerprint
from llmpipe.ledger import FILE, LedgerSnapshot, differences
from llmpipe.outputs import ERRORS_FILE, METRICS_FILE, REPORT_FILE, WRITERS, Answered, new_files, seal
from llmpipe.pipeline import Before, layout_of, look_through, scored
from llmpipe.prompts import PromptBuilder
from llmpipe.records import Completion, Row


class Exported(NamedTuple):
    """What was written."""

    path: Path
    rows: int
    """Rows that are finished, and in the file."""
    of: int
    """Rows of the dataset."""


def export(config: RunConfig, directory: str | Path, file: str | Path | None = None) -> Exported:
    """Write the answers that a run has so far.

    Args:
        config: The run's configuration; its output options may differ from the run's.
        directory: The run directory.
        file: Where to, .jsonl or .parquet; by default `partial.jsonl` or `partial.parquet` in the directory.

    Raises:
        LLMConfigError: the file is of no known type, or one of the run's own.
        DatasetError: the dataset was changed since the run began.
        LedgerError: the directory holds no run, or a damaged one.
        LLMError: the file cannot be written.
    """
    directory = Path(directory)
    path = directory / f"partial.{config.output.format.value}" if file is None else Path(file).expanduser()
    config = config.replace({"output": replace(config.output, format=_format_of(path, directory))})
    with LedgerSnapshot(directory) as ledger, Inputs(directory, begun=True, resumed=True) as inputs:
        before = Before.of(directory)
        dataset, scan, types = look_through(config, inputs, before)
        asked = ledger.get("fingerprint")
        asking = continued(fingerprint(config, scan, asked), asked, scan)["dataset"]
        if changes := "; ".join(differences(asked["dataset"], asking, "dataset")):
            changed = before.change(scan)
            raise DatasetError(
                f"the dataset is not the one that {directory} is a run of: {changes}{f'; {changed}' if changed else ''}"
            )
        layout = layout_of(config, scan, max(config.sampling.n, ledger.most_samples()))
        layout.check(scan.columns)
        chat = ledger.get("prompt_format") != "raw"
        prompts = PromptBuilder(config.prompt, config.dataset.columns, config.sampling, config.seed, chat)
        counter = _Counter()
        answered = scored(counter.finished(dataset.rows(), ledger.completions(), prompts), config)
        with new_files(path.parent, [path.name]) as files:
            writer = WRITERS[config.output.format](files[path.name], layout, types)
            try:
                for one in answered:
                    writer.write(one)
            finally:
                writer.finish()
            seal(files)
    return Exported(path, counter.rows, scan.rows)


class _Counter:
    """Joins rows with what they have so far, and counts those that have all."""

    def __init__(self) -> None:
        self.rows = 0

    def finished(
        self, rows: Iterable[Row], completions: Iterable[Completion], prompts: PromptBuilder
    ) -> Iterator[Answered]:
        """Yield the samples of each finished row; both must be in order."""
        groups = groupby(completions, key=lambda completion: completion.request_id)
        index, group = next(groups, (None, iter(())))
        for row in rows:
            if row.index != index:
                continue
            samples = list(group)
            if _has_all(row, samples, prompts):
                self.rows += 1
                yield from (Answered(row, completion) for completion in samples)
            index, group = next(groups, (None, iter(())))


def _has_all(row: Row, samples: list[Completion], prompts: PromptBuilder) -> bool:
    try:
        return prompts.build(row, frozenset(completion.sample for completion in samples)) is None
    except (ValueError, RecursionError):  # a row that cannot be run has one answer: the reason
        return True


def _format_of(path: Path, directory: Path) -> OutputFormat:
    """Return the format that a file's name asks for.

    Raises:
        LLMConfigError: it asks for none, or the file is one of the run's own.
    """
    formats = [format.value for format in OutputFormat]
    if path.suffix.removeprefix(".") not in formats:
        raise LLMConfigError(f"export_to={str(path)!r} is not allowed; it must end in .{' or .'.join(formats)}")
    own = [FILE, ERRORS_FILE, METRICS_FILE, REPORT_FILE, *(f"outputs.{format}" for format in formats)]
    if path.name in own and path.parent.resolve() == directory.resolve():
        raise LLMConfigError(f"export_to={str(path)!r} is not allowed: that file is the run's own; choose another name")
    if not path.parent.is_dir():
        raise LLMError(f"cannot write {path}: there is no directory {path.parent}")
    return OutputFormat(path.suffix.removeprefix("."))

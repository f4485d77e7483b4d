"""The answers that a run has so far, also while it goes on or after it was killed.

Reads the ledger as it is at one moment, without its lock, and writes the rows that are finished, in input order and
with the columns of the final output. The run, if there is one, does not notice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatch
from glob import has_magic
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from llmpipe.config import RunConfig, split_adapter
from llmpipe.datasets import Inputs
from llmpipe.exceptions import DatasetError, LLMConfigError, LLMError
from llmpipe.fingerprint import backend_values, fingerprint
from llmpipe.ledger import FILE, LedgerSnapshot
from llmpipe.outputs import ERRORS_FILE, WRITERS, Answered, is_same, layout_of, own_file, refuse_foreign, writer_of
from llmpipe.place import check_place
from llmpipe.preflight import look_through
from llmpipe.prompts import PromptBuilder
from llmpipe.records import Completion, Row
from llmpipe.redaction import differences
from llmpipe.resumption import Before
from llmpipe.scorers import scored


class Exported(NamedTuple):
    """What was written."""

    path: Path
    rows: int
    """Rows that are finished, and in the file."""
    of: int
    """Rows of the dataset."""


def export(config: RunConfig, directory: str | Path, file: str | Path | None = None, force: bool = False) -> Exported:
    """Write the answers that a run has so far.

    Args:
        config: The run's configuration; its output options may differ from the run's.
        directory: The run directory.
        file: Where to, .jsonl or .parquet; by default `partial.jsonl` or `partial.parquet` in the directory.
        force: Replace an export of another run, too; what llmpipe did not write, or was changed since, never is.

    Raises:
        LLMConfigError: the file is of no known type, one of a run's own, or one that the run reads.
        DatasetError: the dataset was changed since the run began.
        LedgerError: the directory holds no run, or a damaged one.
        LLMError: the file cannot be written, or is there already and no earlier export of this run.
    """
    directory = Path(directory)
    check_place(directory)
    path = directory / f"partial.{config.output.format}" if file is None else Path(file).expanduser()
    config = config.replace({"output": replace(config.output, format=_format_of(path, directory))})
    with LedgerSnapshot(directory) as ledger, Inputs(directory, begun=True, resumed=True) as inputs:
        run = _named(directory, ledger, path)
        refuse_foreign(path, run, force)  # before all is read
        _refuse_inputs(path, config)
        asked = ledger.get("fingerprint")
        before = Before(True, asked, ledger.get("dataset_files"))
        dataset, scan, types = look_through(config, inputs, before)
        asking = before.continued(fingerprint(config, scan, asked), scan)["dataset"]
        if changes := "; ".join(differences(asked["dataset"], asking, "dataset")):
            changed = before.change(scan, config.dataset)
            raise DatasetError(
                f"the dataset is not the one that {directory} is a run of: {changes}{f'; {changed}' if changed else ''}"
            )
        layout = layout_of(config, scan.columns, max(config.sampling.n, ledger.most_samples()))
        chat = ledger.get("prompt_format") != "raw"
        prompts = PromptBuilder(config.prompt, config.dataset.columns, config.sampling, config.seed, chat)
        counter = _Counter()
        answered = counter.finished(dataset.rows(), ledger.completions(), prompts)
        with own_file(path, run, force) as opened:
            writer = writer_of(config.output)(opened, layout, types)
            try:
                for one in scored(answered, config.metrics.scorers, config.dataset.columns.reference):
                    writer.write(one)
            finally:
                writer.finish()
            ledger.check()
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


def _format_of(path: Path, directory: Path) -> str:
    """Return the format that a file's name asks for.

    Raises:
        LLMConfigError: it asks for none, or the file is one of the run's own.
    """
    if path.suffix.removeprefix(".") not in WRITERS:
        raise LLMConfigError(f"cannot export to {str(path)!r}: it must end in .{' or .'.join(WRITERS)}")
    own = [ERRORS_FILE, *(f"outputs.{format}" for format in WRITERS)]
    of_a_run = path.parent.resolve() == directory.resolve() or (path.parent / FILE).exists()
    if path.name.casefold() in own and of_a_run:  # for there are file systems that know no capitals
        raise LLMConfigError(f"cannot export to {str(path)!r}: that file is the run's own; choose another name")
    if not path.parent.is_dir():
        raise LLMError(f"cannot write {path}: there is no directory {path.parent}")
    return path.suffix.removeprefix(".")


def _named(directory: Path, ledger: LedgerSnapshot, path: Path) -> dict[str, Any]:
    """Return what tells a run from others, also once its dataset has grown, or it was moved with its export."""
    asked = {name: value for name, value in ledger.get("fingerprint").items() if name != "dataset"}
    return {
        "directory": os.path.relpath(directory.resolve(), path.parent.resolve()),
        "started_at": ledger.get("started_at"),
        "asked": hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32],
    }


def _refuse_inputs(path: Path, config: RunConfig) -> None:
    """Refuse to write what the run reads, or to where it would be read as a part of the dataset.

    Raises:
        LLMConfigError: names the option that reads it.
    """
    backend = backend_values(config)
    read = {
        "dataset.path": config.dataset.paths,
        "prompt.tools": [config.prompt.tools],
        **{f"backend.{name}": [backend.get(name)] for name in ("model", "chat_template")},
        "backend.lora": [split_adapter(adapter)[0] for adapter in backend.get("lora") or []],
    }
    for option, given in read.items():
        for name in (Path(name).expanduser() for name in given if isinstance(name, (str, Path))):
            pattern = name if has_magic(str(name)) else name / "**" / "*"
            if is_same(path, name) or (option == "dataset.path" and _is_found(_parts(path), _parts(pattern))):
                raise LLMConfigError(
                    f"cannot export to {str(path)!r}: {option}={str(name)!r} reads it; choose another name"
                )


def _parts(path: Path) -> tuple[str, ...]:
    return Path(os.path.realpath(path)).parts


def _is_found(path: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Say whether a glob pattern finds a path, or would if it were there; both are given by their parts."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_is_found(path[above:], pattern[1:]) for above in range(len(path) + 1))
    return bool(path) and fnmatch(path[0], pattern[0]) and _is_found(path[1:], pattern[1:])

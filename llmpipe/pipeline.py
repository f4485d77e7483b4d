"""The whole story: rows → requests → runner → completions → ledger → outputs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

from filelock import BaseFileLock

from llmpipe.cells import right_answers
from llmpipe.config import DatasetConfig, PromptFormat, RunConfig, check_trusted, describe
from llmpipe.datasets import Dataset, Inputs, Scan, first_change
from llmpipe.exceptions import LedgerError, LLMConfigError, LLMError, LLMInferenceError, LLMInitializationError
from llmpipe.fingerprint import backend_values, compare_facts, continued, facts_of, fingerprint
from llmpipe.first_rows import refuse_hopeless
from llmpipe.ledger import Ledger, begun, held, saved
from llmpipe.metrics import MemorySampler, Totals, environment, scorers, utc_now
from llmpipe.outputs import (
    ID,
    POSITION,
    REPORT_FILE,
    Answered,
    ColumnTypes,
    Layout,
    all_names,
    column_types,
    found_files,
    join,
    new_files,
    output_file,
    output_files,
    seal,
    write_answers,
    write_metrics,
)
from llmpipe.place import check_place
from llmpipe.progress import Progress, Watch
from llmpipe.prompts import OTHER_NAMES, PromptBuilder, settle_prompt, template_columns, unread_columns
from llmpipe.quoting import how_to_resume
from llmpipe.records import Request, Row, Stopwatch, failed
from llmpipe.redaction import as_written, below, sealed
from llmpipe.report import Report
from llmpipe.runners.base import BaseLLMRunner
from llmpipe.runners.digests import ModelChanged, Witness
from llmpipe.runners.factory import LLMRunnerFactory
from llmpipe.runners.isolated import IsolatedRunner
from llmpipe.sharegpt import CONVERSATIONS
from llmpipe.stopping import Stops, WaitingIsOver

log = logging.getLogger(__name__)


def run(
    config: RunConfig, directory: str | Path, progress: Watch | None = None, arguments: Sequence[str] = ()
) -> dict[str, Any]:
    """Run a dataset through a model, or continue where an earlier run in `directory` ended.

    Args:
        config: The run; see `llmpipe.compose`.
        directory: Where outputs, metrics and ledger go.
        progress: Told how far the run is, at each step and of each answer.
        arguments: The command line `config` was composed from; kept in the directory for `llmpipe resume=`.

    Returns:
        The content of `metrics.json`.

    Raises:
        LLMConfigError, DatasetError, LLMInitializationError, LedgerError: the run cannot start; nothing was generated.
        LLMInferenceError: the runner failed; what was finished is in the ledger.
        DatasetError: also where the dataset was changed while it was read; what was finished is in the ledger.
        RunInterrupted, RunStopped: a signal or errors ended the run; what was finished is in the ledger.
    """
    directory = Path(directory)
    config = config.replace({"prompt": settle_prompt(config.prompt)})
    if config.plan or config.export is not None:
        raise LLMConfigError("plan=true and export= generate nothing: call llmpipe.plan.plan or llmpipe.export.export")
    if config.resume is not None and Path(config.resume).resolve() != directory.resolve():
        raise LLMConfigError(f"resume={config.resume!r} is not allowed here: give that directory to run() itself")
    check_place(directory)
    with held(directory) as lock:
        return begin_or_continue(config, directory, lock, progress, arguments)


def begin_or_continue(
    config: RunConfig,
    directory: Path,
    lock: BaseFileLock,
    progress: Watch | None,
    arguments: Sequence[str],
) -> dict[str, Any]:
    """Run, as `run`, in a directory that no other process works in."""
    before = Before.of(directory)
    with Inputs(directory, before.begun, resumed=config.resume is not None) as inputs:
        dataset, scan, types = look_through(config, inputs, before)
        if not before.begun:  # a fresh run: it leaves nothing where it may not write at its end
            found_files(directory, output_files(config.output), {})
            refuse_hopeless(config, dataset, lambda runner: runs_chats(config, scan, runner))
        witness = Witness(f"; put it back as it was, and continue with: {how_to_resume(directory)}")
        asked = fingerprint(config, scan, before.fingerprint, witness)
        facts = {**begun_with(arguments), "dataset_files": scan.contents}
        with (
            Ledger(
                directory, continued(asked, before.fingerprint, scan), before.change(scan, config.dataset), facts, lock
            ) as ledger,
            MemorySampler(config.metrics.memory_interval_s) as memory,
        ):
            inputs.keep()
            ledger.before_commit = witness.check
            note_asked(ledger, asked, scan, arguments)
            if not ledger.finished():
                found_files(directory, output_files(config.output), ledger.get("files") or {})
                generate(config, dataset, scan, ledger, directory, memory, progress or (lambda *_: None))
            return conclude(config, dataset, scan, types, ledger, directory, memory)


class Before(NamedTuple):
    """What is noted in a directory of the run that began there, if one did."""

    begun: bool = False
    fingerprint: dict[str, Any] | None = None
    files: list[list[Any]] | None = None
    """What the rows of its dataset held, file by file."""

    @classmethod
    def of(cls, directory: Path) -> Before:
        """Read it; the ledger is left as it is.

        Raises:
            LedgerError: it is damaged.
        """
        return cls(True, *saved(directory, "fingerprint", "dataset_files")) if begun(directory) else cls()

    @property
    def rows(self) -> int | None:
        """How many there were."""
        rows: int | None = (self.fingerprint or {}).get("dataset", {}).get("rows")
        return rows

    def change(self, scan: Scan, config: DatasetConfig) -> str | None:
        """Say which file of the dataset has changed in the rows that it had, if one has; not of other rows of it."""
        known = (self.fingerprint or {}).get("dataset", {})
        others = (config.shuffle, config.offset) != (known.get("shuffle"), known.get("offset"))
        if others or (config.limit is not None and config.limit < (self.rows or 0)):
            return None
        return first_change(self.files or [], scan.contents if scan.earlier is None else scan.earlier)


def begun_with(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the command line of a run as it is noted, with the directory from which it names its files."""
    try:
        place = os.getcwd()
    except OSError:  # it is gone, and so nothing was named from there
        place = None
    return {"arguments": list(arguments), "working_directory": place}


def note_asked(ledger: Ledger, asked: dict[str, Any], scan: Scan, arguments: Sequence[str]) -> None:
    """Note what is asked of the run where that is new: at its beginning, and when its dataset has grown."""
    known = ledger.get("fingerprint")["dataset"]
    facts = {**(begun_with(arguments) if arguments else {}), "dataset_files": scan.contents}
    if asked["dataset"]["rows"] != known["rows"]:
        log.info("the dataset has grown from %d to %d rows: the new ones are run", known["rows"], scan.rows)
        ledger.grow(asked, **facts)
    elif asked["dataset"] != known or ledger.get("arguments") is None:
        ledger.set(fingerprint=asked, **facts)


def look_through(
    config: RunConfig, inputs: Inputs | None = None, before: Before | None = None
) -> tuple[Dataset, Scan, ColumnTypes | None]:
    """Refuse what can be refused before anything is loaded or written.

    Args:
        config: The run.
        inputs: Keeps what of the dataset can be read only once.
        before: The run that is to be continued: whether the dataset has grown since can then be told.

    Returns:
        The dataset, what is in it, and, where the answers' format needs them, the types of its columns.

    Raises:
        LLMConfigError, DatasetError, MissingDependencyError: the run cannot start.
    """
    dataset, types = Dataset(config.dataset, inputs), column_types(config.output.format)
    check_trusted(backend_values(config).get("_target_", "???"), config.trusted_modules)
    template = None if config.prompt.template is None else template_columns(config.prompt.template)
    also = {*all_names(config.output.prefix, config.metrics.scorers), *OTHER_NAMES}
    scan = dataset.scan(template, None if types is None else types.add, None if before is None else before.rows, also)
    layout_of(config, scan, config.sampling.n).check(scan.columns)
    scorers(config.metrics.scorers)
    if config.prompt.format is PromptFormat.raw:  # else the model's files have to be asked
        check_needs_chats(config, scan, chat=False)
    if not scan.rows:
        log.warning("the dataset has no rows")
    if config.sampling.n > 1 and config.sampling.is_greedy:
        log.warning("sampling.n=%d, and all will be alike: sampling.temperature is 0", config.sampling.n)
    return dataset, scan, types


def generate(
    config: RunConfig,
    dataset: Dataset,
    scan: Scan,
    ledger: Ledger,
    directory: Path,
    memory: MemorySampler,
    progress: Watch,
) -> None:
    """Run every row that the ledger lacks."""
    stops = Stops(config, scan.rows)
    stops.recall(ledger.rows(), ledger.errors())
    stops.raise_if_stopped(directory, dataset)  # before the model loads
    with (
        LLMRunnerFactory.from_target(config.backend, config.device, config.trusted_modules) as runner,
        stops,
    ):
        ledger.before_commit()  # what was loaded is what was digested
        known, facts = ledger.get("facts"), facts_of(runner)
        compare_facts(known or facts, facts, runner.config.reproducible, directory)
        chat = runs_chats(config, scan, runner)
        mention_unread(config, scan, chat)
        prompts = PromptBuilder(config.prompt, config.dataset.columns, config.sampling, config.seed, chat)
        ledger.set(facts=known or facts)
        attempt = _Attempt(ledger, runner, memory, config, prompt_format="chat" if chat else "raw")
        safe = f"what was finished is safe: {how_to_resume(directory)}"
        before, stopwatch = ledger.count(), Stopwatch()
        so_far = Progress(stopwatch, before, scan.rows * config.sampling.n, config.sampling.max_tokens)
        if isinstance(runner, IsolatedRunner):
            runner.suspects = dict(ledger.get("suspects") or [])
            runner.note = ledger.note_suspects
            runner.reloaded = ledger.before_commit
            memory.rss_bytes = runner.rss_bytes

        def tell() -> None:
            so_far.done = before + ledger.noted
            progress(so_far)

        def tick() -> None:
            ledger.check()
            tell()
            stops.check()

        completions = runner.completions(_requests(dataset.blocks(), prompts, ledger, stops), tick, stopwatch)
        try:
            with stops.watching(runner.interrupt):
                for completion in completions:
                    ledger.add([completion])
                    stops.note(completion)
                    so_far.note(completion)
                    tell()
        except WaitingIsOver:  # the end says why
            pass
        except ModelChanged:
            raise
        except (LLMInferenceError, LLMInitializationError) as error:  # in the middle of it: what was there is lost
            raise LLMInferenceError(f"{error}; {safe}") from error
        except Exception as error:
            if isinstance(error, LLMError) or type(runner).__module__.startswith("llmpipe."):
                raise
            log.exception("%s failed", type(runner).__name__)  # its author wants to see where
            why = " ".join(str(error).split()) or type(error).__name__
            raise LLMInferenceError(f"{type(runner).__name__} failed: {why}; {safe}") from error
        finally:
            completions.close()  # type: ignore[attr-defined]
            ledger.commit()
            attempt.ended()
    stops.raise_if_stopped(directory, dataset)
    if ledger.rows() != scan.rows:
        raise LedgerError(
            f"{scan.rows} rows went in and {ledger.rows()} came out; this is a bug of llmpipe, please report it"
        )
    ledger.finish(finished_at=utc_now())


def runs_chats(config: RunConfig, scan: Scan, runner: BaseLLMRunner) -> bool:
    """Say whether plain prompts become chats.

    Raises:
        LLMConfigError: the model has no chat template, and is asked for chats or for what only chats have.
    """
    chat = runner.is_chat(config.prompt.format)
    check_needs_chats(config, scan, chat)
    return chat


def mention_unread(config: RunConfig, scan: Scan, chat: bool) -> None:
    """Say which columns look as if they were meant to be read, and are not."""
    unread = unread_columns(config.prompt, config.dataset.columns, scan.columns, chat)
    if unread:
        log.warning("nothing reads the columns %s", ", ".join(f"{name} ({why})" for name, why in unread.items()))


def check_needs_chats(config: RunConfig, scan: Scan, chat: bool) -> None:
    """Refuse a system message, or what else only a chat template takes, where there are no chats.

    Raises:
        LLMConfigError: says what to do.
    """
    if chat or {config.dataset.columns.messages, CONVERSATIONS} & set(scan.columns):
        return
    for name in ("system", "tools", "chat_template_kwargs"):
        if getattr(config.prompt, name) not in (None, {}):
            raise LLMConfigError(
                f"prompt.{name}= needs chats, and these prompts go in raw: use prompt=chat, or drop it"
            )


def _requests(blocks: Iterable[list[Row]], prompts: PromptBuilder, ledger: Ledger, stops: Stops) -> Iterator[Request]:
    """Yield the requests for what is not done; rows that cannot be run go to the ledger at once."""
    resuming = ledger.count() > 0
    for block in blocks:
        done = ledger.done(block[0].index, block[-1].index) if resuming else {}
        for row in block:
            if stops.pulls_no_more():
                return
            finished = done.get(row.index, frozenset())
            try:
                request = prompts.build(row, finished)
            except (ValueError, RecursionError) as error:
                if not finished:
                    completion = failed(row.index, str(error))
                    stops.asked()
                    ledger.add([completion])
                    stops.note(completion)
                continue
            if request is not None:
                if not finished:
                    stops.asked()
                yield request


def conclude(
    config: RunConfig,
    dataset: Dataset,
    scan: Scan,
    types: ColumnTypes | None,
    ledger: Ledger,
    directory: Path,
    memory: MemorySampler,
) -> dict[str, Any]:
    """Write outputs and metrics from the ledger, unless they are there and whole."""
    written = config.written()
    options = {"output": describe(config.output), "metrics": describe(config.metrics)}
    wanted = sealed(options, {name: written[name] for name in options}, ledger.get("written_as"))
    names = output_files(config.output)
    known: dict[str, list[str]] = ledger.get("files") or {}
    there = found_files(directory, names, known)
    if ledger.get("written_as") == wanted and all(
        name in known and there.get(name) == known[name][0] for name in names
    ):
        return dict(ledger.get("summary"))
    layout = layout_of(config, scan, max(config.sampling.n, ledger.most_samples()))
    layout.check(scan.columns)
    totals, report = Totals(), Report(config.dataset.columns, templated=config.prompt.template is not None)
    answered = noted(scored(join(dataset.rows(), ledger.completions()), config), totals, report)
    with new_files(directory, names) as files:
        write_answers(files, config.output, layout, types, answered)
        if ledger.get("summary") is None:  # else a file is written again, as it was
            ledger.set(peak_rss_mb=max(ledger.get("peak_rss_mb") or 0.0, memory.peak_rss_mb))
        metrics = {
            **totals.summary(ledger.get("wall_s") or 0.0),
            "load_s": ledger.get("load_s"),
            "peak_rss_mb": ledger.get("peak_rss_mb"),
            "peak_device_mb": ledger.get("peak_device_mb"),
            "prompt_format": ledger.get("prompt_format"),
            "started_at": ledger.get("started_at"),
            "finished_at": ledger.get("finished_at"),
            "seed": written["seed"],
            "model_digest": ledger.get("fingerprint")["model"],
            "dataset_digest": scan.digest,
            "runner": ledger.get("runner"),
            "environment": environment(),
            "output": output_file(config.output),
        }
        write_metrics(files, metrics)
        files[REPORT_FILE].write(report.page(metrics, written))
        # Known before they have their names, so that a run that is killed here knows them; until all have theirs,
        # those of before may stand there.
        new = {name: list(dict.fromkeys([digest, there.get(name, digest)])) for name, digest in seal(files).items()}
        ledger.set(files=known | new, written_as=wanted, summary=metrics)
    return metrics


def scored(answered: Iterable[Answered], config: RunConfig) -> Iterator[Answered]:
    """Score each completion whose row has a reference."""
    chosen = scorers(config.metrics.scorers)
    for row, completion in answered:
        right = right_answers(row.value(config.dataset.columns.reference), row.typed)
        if right and completion.text is not None:
            completion.scores = {
                name: max(score(completion.text, one) for one in right) for name, score in chosen.items()
            }
        elif right:
            completion.scores = dict.fromkeys(chosen, 0.0)  # a row without an answer has no right one
        yield Answered(row, completion)


def noted(answered: Iterable[Answered], totals: Totals, report: Report) -> Iterator[Answered]:
    """Show each output row to what sums up the run."""
    for one in answered:
        totals.add(one.completion)
        report.add(*one)
        yield one


def layout_of(config: RunConfig, scan: Scan, samples: int) -> Layout:
    """Return the columns that the answers gain, for rows of at most so many samples."""
    columns, has_id = config.dataset.columns, ID in scan.columns
    scored = columns.reference in scan.columns
    return Layout(
        prefix=config.output.prefix,
        id_column=columns.id,
        source=config.output.source,
        adds_id=columns.id != ID or not has_id,
        sample=samples > 1,
        truncated=config.prompt.overflow.value == "truncate",
        scorers=tuple(config.metrics.scorers) if scored else (),
        # Where rows are named by position, ids of their own ride along.
        id_name=POSITION if columns.id is None and has_id else ID,
    )


def told(info: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Return what a runner says of itself, with references where its options came from the environment."""
    said: dict[str, Any] = as_written(info, below(config.references, "backend"))
    return said


class _Attempt:
    """Notes in the ledger what this attempt takes, on top of the attempts before it."""

    def __init__(
        self, ledger: Ledger, runner: BaseLLMRunner, memory: MemorySampler, config: RunConfig, prompt_format: str
    ) -> None:
        self._ledger, self._runner, self._memory, self._config = ledger, runner, memory, config
        self._before = {name: ledger.get(name) or 0.0 for name in ("wall_s", "peak_rss_mb", "peak_device_mb")}
        started_at, offset_s = ledger.get("started_at") or utc_now(), ledger.get("utc_offset_s")
        started = datetime.fromisoformat(started_at)
        if offset_s is None:
            offset_s = time.localtime(started.timestamp()).tm_gmtoff
        runner.now = started.astimezone(timezone(timedelta(seconds=offset_s)))  # by the clocks where the run began
        facts = {"started_at": started_at, "utc_offset_s": offset_s}
        ledger.set(load_s=runner.load_s, prompt_format=prompt_format, **facts)
        self._started = time.perf_counter()
        ledger.alongside = self._figures  # so that an attempt that is killed counts too

    def _figures(self) -> dict[str, Any]:
        return {
            "wall_s": self._before["wall_s"] + time.perf_counter() - self._started,
            "peak_rss_mb": max(self._before["peak_rss_mb"], self._memory.peak_rss_mb),
        }

    def ended(self) -> None:
        device = self._runner.memory_usage()["peak_device_mb"] or 0.0
        peak = max(self._before["peak_device_mb"], device) or None
        did = self._ledger.noted or self._ledger.get("runner") is None  # else another attempt's figures say more
        runner = {"runner": told(self._runner.info(), self._config)} if did else {}
        self._ledger.set(peak_device_mb=peak, **runner, **self._figures())

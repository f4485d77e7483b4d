"""The whole story: rows → requests → runner → completions → ledger → outputs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import BaseFileLock

from llmpipe.attempt import Attempt, utc_now
from llmpipe.config import RunConfig, describe, is_own
from llmpipe.datasets import Dataset, Inputs, Scan
from llmpipe.exceptions import (
    LedgerError,
    LLMError,
    LLMInferenceError,
    LLMInitializationError,
    one_line,
)
from llmpipe.failures import Failures
from llmpipe.fingerprint import compare_facts, continued, facts_of, fingerprint
from llmpipe.first_rows import refuse_hopeless
from llmpipe.ledger import Ledger, held
from llmpipe.memory import MemorySampler
from llmpipe.metrics import Totals, engine_speeds, environment
from llmpipe.outputs import (
    REPORT_FILE,
    Answered,
    ColumnTypes,
    found_files,
    join,
    layout_of,
    new_files,
    output_file,
    output_files,
    seal,
    write_answers,
    write_metrics,
)
from llmpipe.place import check_place
from llmpipe.preflight import look_through, mention_unread, runs_chats
from llmpipe.progress import Progress, Watch
from llmpipe.prompts import PromptBuilder, settle_prompt
from llmpipe.quoting import how_to_resume
from llmpipe.records import Request, Row, failed
from llmpipe.redaction import sealed
from llmpipe.report import Report
from llmpipe.resumption import Before, begun_with, note_asked
from llmpipe.runners.digests import ModelChanged, Witness
from llmpipe.runners.factory import LLMRunnerFactory
from llmpipe.runners.isolated import IsolatedRunner
from llmpipe.scorers import scored
from llmpipe.stopping import Stops, WaitingIsOver
from llmpipe.stopwatch import Stopwatch

log = logging.getLogger(__name__)


def run(
    config: RunConfig,
    directory: str | Path,
    progress: Watch | None = None,
    arguments: Sequence[str] = (),
    resumed: bool = False,
) -> dict[str, Any]:
    """Run a dataset through a model, or continue where an earlier run in `directory` ended.

    Args:
        config: The run; see `llmpipe.compose`.
        directory: Where outputs, metrics and ledger go.
        progress: Told how far the run is, at each step and of each answer.
        arguments: The command line `config` was composed from; kept in the directory for `llmpipe resume`.
        resumed: Of standard input and pipes, take the copies that the directory has, without a look at the streams.

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
    check_place(directory)
    with held(directory) as lock:
        return begin_or_continue(config, directory, lock, progress, arguments, resumed)


def begin_or_continue(
    config: RunConfig,
    directory: Path,
    lock: BaseFileLock,
    progress: Watch | None,
    arguments: Sequence[str],
    resumed: bool,
) -> dict[str, Any]:
    """Run, as `run`, in a directory that no other process works in."""
    before = Before.of(directory)
    with Inputs(directory, before.begun, resumed) as inputs:
        dataset, scan, types = look_through(config, inputs, before)
        if not before.begun:  # a fresh run: it leaves nothing where it may not write at its end
            found_files(directory, output_files(config.output), {})
            refuse_hopeless(config, dataset, scan)
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
        attempt = Attempt(ledger, runner, memory, config, prompt_format="chat" if chat else "raw")
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
            if isinstance(error, LLMError) or is_own(type(runner).__module__):
                raise
            log.exception("%s failed", type(runner).__name__)  # its author wants to see where
            why = one_line(error)
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
    layout = layout_of(config, scan.columns, max(config.sampling.n, ledger.most_samples()))
    totals, report = Totals(), Report(config.dataset.columns, templated=config.prompt.template is not None)
    failures = Failures()
    answered = join(dataset.rows(), ledger.completions())
    answered = scored(answered, config.metrics.scorers, config.dataset.columns.reference)
    with new_files(directory, names) as files:
        write_answers(files, config.output, layout, types, noted(answered, totals, report, failures))
        if ledger.get("summary") is None:  # else a file is written again, as it was
            ledger.set(peak_rss_mb=max(ledger.get("peak_rss_mb") or 0.0, memory.peak_rss_mb))
        metrics = {
            **totals.summary(ledger.get("wall_s") or 0.0),
            **engine_speeds(ledger.get("runner") or {}),
            "error_reasons": failures.most_frequent(),
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
        files[REPORT_FILE].write(report.page(metrics, written, totals.times["latency_s"], totals.answer_tokens))
        # Known before they have their names, so that a run that is killed here knows them; until all have theirs,
        # those of before may stand there.
        new = {name: list(dict.fromkeys([digest, there.get(name, digest)])) for name, digest in seal(files).items()}
        ledger.set(files=known | new, written_as=wanted, summary=metrics)
    return metrics


def noted(answered: Iterable[Answered], totals: Totals, report: Report, failures: Failures) -> Iterator[Answered]:
    """Show each output row to what sums up the run."""
    for one in answered:
        totals.add(one.completion)
        report.add(*one)
        if one.completion.error is not None:
            failures.add(one.row.index, one.row.file, one.row.line, one.completion.error)
        yield one

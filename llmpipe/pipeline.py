"""The whole story: rows → requests → runner → completions → ledger → outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from filelock import BaseFileLock

from llmpipe.attempt import Attempt, utc_now
from llmpipe.conclusion import conclude
from llmpipe.config import RunConfig
from llmpipe.datasets import Inputs
from llmpipe.exceptions import LedgerError
from llmpipe.fingerprint import compare_facts, facts_of, fingerprint
from llmpipe.first_rows import refuse_hopeless
from llmpipe.ledger import Ledger, held
from llmpipe.outputs import found_files, output_files
from llmpipe.place import check_place
from llmpipe.preflight import Material, look_through, mention_unread, runs_chats
from llmpipe.progress import Progress, Watch
from llmpipe.prompts import PromptBuilder, settle_prompt
from llmpipe.quoting import how_to_resume
from llmpipe.records import Request, Row, failed
from llmpipe.resumption import Before, begun_with, note_asked
from llmpipe.runners.digests import Witness
from llmpipe.runners.driver import Driver
from llmpipe.runners.factory import LLMRunnerFactory
from llmpipe.stopping import Stops
from llmpipe.stopwatch import Stopwatch
from llmpipe.system.memory import MemorySampler


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
        material = look_through(config, inputs, before)
        dataset, scan, _ = material
        if not before.begun:  # a fresh run: it leaves nothing where it may not write at its end
            found_files(directory, output_files(config.output), {})
            refuse_hopeless(config, dataset, scan)
        witness = Witness(f"; put it back as it was, and continue with: {how_to_resume(directory)}")
        asked = fingerprint(config, scan, before.fingerprint, witness)
        facts = {**begun_with(arguments), "dataset_files": scan.contents}
        with (
            Ledger(
                directory, before.continued(asked, scan), before.change(scan, config.dataset), facts, lock
            ) as ledger,
            MemorySampler(config.metrics.memory_interval_s) as memory,
        ):
            inputs.keep()
            ledger.before_commit = witness.check
            note_asked(ledger, asked, scan, arguments)
            if not ledger.finished():
                found_files(directory, output_files(config.output), ledger.get("files") or {})
                generate(config, material, ledger, memory, progress or (lambda *_: None))
            return conclude(config, material, ledger, memory)


def generate(config: RunConfig, material: Material, ledger: Ledger, memory: MemorySampler, progress: Watch) -> None:
    """Run every row that the ledger lacks."""
    dataset, scan, directory = material.dataset, material.scan, ledger.directory
    stops = Stops(config, scan.rows)
    stops.recall(ledger.rows(), ledger.errors())
    stops.raise_if_stopped(directory, dataset)  # before the model loads
    with (
        LLMRunnerFactory.from_target(config.backend, config.device, config.trusted_modules) as runner,
        stops,
    ):
        ledger.before_commit()  # the files were digested before they were loaded, and might have changed in between
        known, facts = ledger.get("facts"), facts_of(runner)
        compare_facts(known or facts, facts, runner.config.reproducible, directory)
        chat = runs_chats(config, scan, runner)
        mention_unread(config, scan, chat)
        prompts = PromptBuilder(config.prompt, config.dataset.columns, config.sampling, config.seed, chat)
        ledger.set(facts=known or facts)
        attempt = Attempt(ledger, runner, memory, config, prompt_format="chat" if chat else "raw")
        before, stopwatch = ledger.count(), Stopwatch()
        so_far = Progress(stopwatch, before, scan.rows * config.sampling.n, config.sampling.max_tokens)
        memory.watch(runner.rss_bytes)

        def tell() -> None:
            so_far.done = before + ledger.noted
            so_far.expected = so_far.done + stopwatch.waiting + (scan.rows - stops.begun) * config.sampling.n
            progress(so_far)

        def tick() -> None:
            ledger.check()
            tell()
            stops.check()

        driver = Driver(tick, dict(ledger.get("suspects") or []), ledger.note_suspects, reloaded=ledger.before_commit)
        completions = runner.completions(_requests(dataset.blocks(), prompts, ledger, stops), driver, stopwatch)
        # Closed before the attempt ends: a runner at work cannot say what it takes.
        with attempt, closing(completions), stops.watching(runner.interrupt):  # type: ignore[type-var]
            for completion in completions:
                ledger.add([completion])
                stops.note(completion)
                so_far.note(completion)
                tell()
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

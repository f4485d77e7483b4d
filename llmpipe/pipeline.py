"""The whole story: rows → requests → runner → completions → ledger → outputs."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, Self

from llmpipe.config import BackendConfig, RunConfig, answer_fields, conf_dir, describe, register_schemas
from llmpipe.datasets import Dataset, Scan
from llmpipe.exceptions import LedgerError, LLMConfigError, LLMError
from llmpipe.ledger import Ledger
from llmpipe.metrics import MemorySampler, Totals, environment, scorers
from llmpipe.outputs import Answered, Layout, file_digest, join, output_file, write_metrics, write_outputs
from llmpipe.prompts import PromptBuilder, template_columns
from llmpipe.records import Request, failed
from llmpipe.runners.base import BaseLLMRunner
from llmpipe.runners.factory import LLMRunnerFactory, check_trusted
from llmpipe.runners.weights import content_digest, model_digest

log = logging.getLogger(__name__)

ROUNDING_OPTIONS = ("n_gpu_layers", "tensor_split", "batch_tokens", "micro_batch_tokens")
"""Options that change an answer's last digits, and so count in reproducible mode only."""
BLOCK_ROWS = 512
"""Rows that are looked up in the ledger together when a run is resumed."""

Progress = Callable[[int, int, int], None]
"""Called with completions done, completions expected, and tokens generated so far."""


class RunInterrupted(LLMError):
    """A signal ended the run; what was finished is in the ledger.

    Args:
        directory: The run directory, which can be resumed.
        signum: The signal.
    """

    def __init__(self, directory: Path, signum: int) -> None:
        self.signum = signum
        super().__init__(f"interrupted by {signal.Signals(signum).name}; continue with: llmpipe resume={directory}")


def run(
    config: RunConfig, directory: str | Path, progress: Progress | None = None, arguments: Sequence[str] = ()
) -> dict[str, Any]:
    """Run a dataset through a model, or continue where an earlier run in `directory` ended.

    Args:
        config: The run; see `compose`.
        directory: Where outputs, metrics and ledger go.
        progress: Told of every completion.
        arguments: The command line `config` was composed from; kept in the directory for `llmpipe resume=`.

    Returns:
        The content of `metrics.json`.

    Raises:
        LLMConfigError, DatasetError, LLMInitializationError, LedgerError: the run cannot start; nothing was generated.
        LLMInferenceError: the runner failed; what was finished is in the ledger.
        RunInterrupted: a signal ended the run; what was finished is in the ledger.
    """
    directory = Path(directory)
    dataset = Dataset(config.dataset)
    check_trusted(_backend_values(config).get("_target_", "???"), config.trusted_modules)
    scan = dataset.scan(None if config.prompt.template is None else template_columns(config.prompt.template))
    _layout(config, scan, config.sampling.n).check(scan.columns)
    scorers(config.metrics.scorers)
    with Ledger(directory, fingerprint(config, scan)) as ledger:
        if ledger.get("arguments") is None:
            ledger.set(arguments=list(arguments))
        if not ledger.get("complete"):
            generate(config, dataset, scan, ledger, directory, progress or (lambda *_: None))
        return conclude(config, dataset, scan, ledger, directory)


def generate(
    config: RunConfig, dataset: Dataset, scan: Scan, ledger: Ledger, directory: Path, progress: Progress
) -> None:
    """Run every row that the ledger lacks."""
    attempt = _Attempt(ledger)
    with (
        MemorySampler(config.metrics.memory_interval_s) as memory,
        LLMRunnerFactory.from_target(config.backend, config.device, config.trusted_modules) as runner,
        _Signals() as signals,
    ):
        chat = runner.is_chat(config.prompt.format)
        if config.prompt.system is not None and not chat and config.dataset.columns.messages not in scan.columns:
            raise LLMConfigError("prompt.system= needs chats, and these prompts go in raw: use prompt=chat, or drop it")
        prompts = PromptBuilder(config.prompt, config.dataset.columns, config.sampling, config.seed, chat)
        attempt.began(runner, prompt_format="chat" if chat else "raw")
        before, expected, tokens = ledger.count(), scan.rows * config.sampling.n, 0
        completions = runner.completions(_requests(dataset, prompts, ledger, signals))
        try:
            for completion in completions:
                ledger.add([completion])
                tokens += completion.completion_tokens or 0
                progress(before + ledger.noted, expected, tokens)
                if signals.received:
                    break
        finally:
            completions.close()  # type: ignore[attr-defined]
            ledger.commit()
            attempt.ended(runner, memory.peak_rss_mb)
    if signals.received:
        raise RunInterrupted(directory, signals.received)
    if ledger.rows() != scan.rows:
        raise LedgerError(
            f"{scan.rows} rows went in and {ledger.rows()} came out; this is a bug of llmpipe, please report it"
        )
    ledger.set(complete=True)


def _requests(dataset: Dataset, prompts: PromptBuilder, ledger: Ledger, signals: _Signals) -> Iterator[Request]:
    """Yield the requests for what is not done; rows that cannot be run go to the ledger at once."""
    resuming = ledger.count() > 0
    rows = dataset.rows()
    while block := list(islice(rows, BLOCK_ROWS)):
        done = ledger.done(block[0].index, block[-1].index) if resuming else {}
        for row in block:
            if signals.received:
                return
            finished = done.get(row.index, frozenset())
            try:
                request = prompts.build(row, finished)
            except (ValueError, RecursionError) as error:
                if not finished:
                    ledger.add([failed(row.index, str(error))])
                continue
            if request is not None:
                yield request


def conclude(config: RunConfig, dataset: Dataset, scan: Scan, ledger: Ledger, directory: Path) -> dict[str, Any]:
    """Write outputs and metrics from the ledger, unless they are there and whole."""
    wanted = {"output": describe(config.output), "metrics": describe(config.metrics)}
    files: dict[str, str] = ledger.get("files") or {}
    there = [name for name in files if (directory / name).is_file()]
    for name in there:
        if file_digest(directory / name) != files[name]:
            raise LedgerError(f"{directory / name} was changed since the run; move it away to have it written again")
    if there and len(there) == len(files) and ledger.get("written_as") == wanted:
        return dict(ledger.get("summary"))
    layout = _layout(config, scan, max(config.sampling.n, ledger.most_samples()))
    layout.check(scan.columns)
    totals = Totals()
    answered = _scored(join(dataset.rows(), ledger.completions()), config, totals)
    ledger.set(files={})  # if this is cut short, nothing is expected to be there
    files = write_outputs(directory, config.output, layout, dataset.rows, answered)
    metrics = {
        **totals.summary(ledger.get("wall_s") or 0.0),
        "load_s": ledger.get("load_s"),
        "peak_rss_mb": ledger.get("peak_rss_mb"),
        "peak_device_mb": ledger.get("peak_device_mb"),
        "prompt_format": ledger.get("prompt_format"),
        "seed": config.seed,
        "model_digest": ledger.get("fingerprint")["model"],
        "dataset_digest": scan.digest,
        "runner": ledger.get("runner"),
        "environment": environment(),
        "output": output_file(directory, config.output).name,
    }
    files |= write_metrics(directory, metrics)
    ledger.set(files=files, written_as=wanted, summary=metrics)
    return metrics


def _scored(answered: Iterator[Answered], config: RunConfig, totals: Totals) -> Iterator[Answered]:
    """Score each completion whose row has a reference, and count it."""
    chosen = scorers(config.metrics.scorers)
    for row, completion in answered:
        reference = row.values.get(config.dataset.columns.reference)
        if reference is not None and completion.text is not None:
            completion.scores = {name: score(completion.text, str(reference)) for name, score in chosen.items()}
        elif reference is not None:
            completion.scores = dict.fromkeys(chosen, 0.0)  # a row without an answer has no right one
        totals.add(completion)
        yield Answered(row, completion)


def _layout(config: RunConfig, scan: Scan, samples: int) -> Layout:
    scored = config.dataset.columns.reference in scan.columns
    return Layout(
        prefix=config.output.prefix,
        id_column=config.dataset.columns.id,
        adds_id=config.dataset.columns.id != "id" or "id" not in scan.columns,
        sample=samples > 1,
        truncated=config.prompt.overflow.value == "truncate",
        scorers=tuple(config.metrics.scorers) if scored else (),
    )


def fingerprint(config: RunConfig, scan: Scan) -> dict[str, Any]:
    """Return what decides the answers of a run: its resumption must have the same."""
    return {
        **_backend_fingerprint(config),
        "sampling": answer_fields(config.sampling),
        "prompt": answer_fields(config.prompt),
        "dataset": {"digest": scan.digest, "columns": describe(config.dataset.columns), "limit": config.dataset.limit},
        "seed": config.seed,
    }


def _backend_fingerprint(config: RunConfig) -> dict[str, Any]:
    values = _backend_values(config)
    if not str(values.get("_target_")).startswith("llmpipe."):  # nobody here knows what its options mean
        return {"model": values.get("model"), "backend": values}
    values = answer_fields(config.backend)
    model = values.pop("model", None)
    if values["reproducible"]:  # then the last digit counts, and these decide it
        values |= {name: value for name, value in describe(config.backend).items() if name in ROUNDING_OPTIONS}
        values["device"] = str(config.device)
    for name in ("chat_template", "lora"):  # what is in the files counts, not what they are called
        values[name] = [content_digest(str(text)) for text in _as_list(values.get(name))]
    return {"model": model if model is None else model_digest(str(model)), "backend": values}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _backend_values(config: RunConfig) -> dict[str, Any]:
    return describe(config.backend) if isinstance(config.backend, BackendConfig) else dict(config.backend)


class _Attempt:
    """Notes in the ledger what this attempt took, on top of the attempts before it."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._wall_before: float = ledger.get("wall_s") or 0.0
        self._started = time.perf_counter()

    def began(self, runner: BaseLLMRunner, prompt_format: str) -> None:
        self._started = time.perf_counter()
        self._ledger.set(load_s=runner.load_s, prompt_format=prompt_format)

    def ended(self, runner: BaseLLMRunner, peak_rss_mb: float) -> None:
        peaks = {"peak_rss_mb": peak_rss_mb, "peak_device_mb": runner.memory_usage()["peak_device_mb"]}
        known = {
            name: max(filter(None, (value, self._ledger.get(name))), default=None) for name, value in peaks.items()
        }
        self._ledger.set(runner=runner.info(), wall_s=self._wall_before + time.perf_counter() - self._started, **known)


class _Signals:
    """Turns the first SIGINT or SIGTERM into a wish to stop; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python delivers no signals
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signum
            log.warning("stopping after %s; once more to stop at once", signal.Signals(signum).name)
        else:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)


def compose(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> RunConfig:
    """Compose a run's configuration as the command line does, from the same files.

    Args:
        overrides: As on the command line: `["backend=transformers", "sampling.temperature=0.7"]`.
        config_dir: A directory of further YAML files, as with `--config-dir`.

    Raises:
        LLMConfigError: a value is out of range.
        hydra.errors.HydraException: a key or option does not exist.
    """
    import hydra

    register_schemas()
    extra = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_run_config(hydra.compose("config", [*overrides, *extra]))


def to_run_config(composed: Any) -> RunConfig:
    """Turn Hydra's composed config into dataclasses, checking every value.

    Raises:
        LLMConfigError: a value is out of range.
    """
    from omegaconf import OmegaConf

    config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig)
    return config

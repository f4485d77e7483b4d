"""The ledger of a finished run → its outputs, metrics and report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from llmpipe.config import RunConfig, describe
from llmpipe.failures import Failures
from llmpipe.ledger import Ledger
from llmpipe.metrics import Totals, engine_speeds, environment
from llmpipe.outputs import (
    REPORT_FILE,
    Answered,
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
from llmpipe.preflight import Material
from llmpipe.redaction import sealed
from llmpipe.report import Report
from llmpipe.scorers import scored
from llmpipe.system.memory import MemorySampler


def conclude(config: RunConfig, material: Material, ledger: Ledger, memory: MemorySampler) -> dict[str, Any]:
    """Write outputs, metrics and report from the ledger, unless they are there and whole."""
    dataset, scan, types = material
    directory = ledger.directory
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
        write_answers(files, config.output, layout, types, _noted(answered, totals, report, failures))
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


def _noted(answered: Iterable[Answered], totals: Totals, report: Report, failures: Failures) -> Iterator[Answered]:
    """Show each output row to what sums up the run."""
    for one in answered:
        totals.add(one.completion)
        report.add(*one)
        if one.completion.error is not None:
            failures.add(one.row.index, one.row.file, one.row.line, one.completion.error)
        yield one

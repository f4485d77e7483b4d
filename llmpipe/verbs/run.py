"""`llmpipe [run] KEY=VALUE…`: run a dataset through a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmpipe.config.escapes import text_of
from llmpipe.config.trust import key_of
from llmpipe.ledger import begun
from llmpipe.verbs.arguments import Parser
from llmpipe.verbs.jobs import Job, run_jobs

ABOUT = """\
Runs every row of a dataset through a model and writes the answers, and what they took, to a directory
of their own: outputs/DATE/TIME, or what hydra.run.dir= says. With -m, runs once for each combination of
values: llmpipe -m sampling.temperature=0,0.7,1.2"""


def main(arguments: Sequence[str]) -> int | None:
    """Run, or go on in a directory that holds a run with the same configuration."""
    asked = Parser("run", ABOUT).read_settings(arguments)
    given = {key_of(setting): text_of(setting) for setting in asked.settings}
    if "hydra.run.dir" in given and begun(Path(given["hydra.run.dir"])):
        asked.settings.insert(0, "hydra.output_subdir=null")  # what was composed when the run began stays there
    return run_jobs(asked, asked.settings, work, compare)


def work(job: Job, resumed: bool = False) -> dict[str, Any]:
    """Run one configuration, show what came of it, and return its metrics."""
    from llmpipe.pipeline import run
    from llmpipe.terminal import ProgressBar, show_summary

    with ProgressBar() as bar:
        metrics = run(job.config, job.directory, bar.update, job.arguments, resumed)
    show_summary(metrics, job.directory)
    return metrics


def compare(jobs: Sequence[tuple[list[str], dict[str, Any] | None]]) -> None:
    """Show the runs of a sweep beside each other, unless none has ended."""
    from llmpipe.terminal import show_comparison

    if any(metrics for _, metrics in jobs):
        show_comparison(jobs)

"""`llmpipe export DIR [--to FILE]`: the answers that a run has so far."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from llmpipe.quoting import quoted
from llmpipe.verbs.arguments import QUIET, Parser, refuse_remote, settings_of_run
from llmpipe.verbs.jobs import Job, run_jobs

ABOUT = """\
Writes the rows that a run has finished, in input order and with the columns of the final output, also while
the run goes on, which does not notice, or after it was killed."""


def main(arguments: Sequence[str]) -> int | None:
    """Export, and leave nothing in the run directory but the export."""
    parser = Parser("export", ABOUT)
    parser.add_argument("--to", metavar="FILE", help="a .jsonl or .parquet file; by default partial.jsonl in DIR")
    parser.add_argument("--force", action="store_true", help="replace an export of another run, but no other file")
    asked = parser.read_settings(arguments, of_a_run=True)
    refuse_remote(asked.to or "", f"--to {quoted(asked.to)}")
    settings = [*QUIET, *settings_of_run(asked), "hydra.job.chdir=false"]
    return run_jobs(asked, settings, partial(work, file=asked.to, force=asked.force))


def work(job: Job, file: str | None, force: bool) -> None:
    """Write what a run has and say how much that is."""
    from llmpipe.export import export
    from llmpipe.terminal import show_export

    show_export(*export(job.config, job.directory, file, force))

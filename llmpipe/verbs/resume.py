"""`llmpipe resume DIR [KEY=VALUE…]`: go on with a run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from llmpipe.verbs import run
from llmpipe.verbs.arguments import Parser, settings_of_run
from llmpipe.verbs.jobs import run_jobs

ABOUT = """\
Does what the run in a directory lacks, with its own configuration, from any working directory; nothing is
done twice. Of KEY=VALUE only what does not change the answers is taken, such as output=parquet."""


def main(arguments: Sequence[str]) -> int | None:
    """Go on with the run in a directory."""
    asked = Parser("resume", ABOUT).read_settings(arguments, of_a_run=True)
    return run_jobs(asked, settings_of_run(asked), partial(run.work, resumed=True))

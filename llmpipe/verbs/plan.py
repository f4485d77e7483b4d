"""`llmpipe plan KEY=VALUE…`: what a run would do and take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmpipe.verbs.arguments import QUIET, Parser
from llmpipe.verbs.jobs import Job, run_jobs

ABOUT = """\
Makes every check of a run, reads every row, loads no weights, and shows which rows would be errors, how many
tokens the prompts have, the slots and the memory, and the first prompts; plan.json has it all. Exit code 3:
some rows would be errors. With -m, plans each job of a sweep."""


def main(arguments: Sequence[str]) -> int | None:
    """Plan, and leave nothing in the run directory but the plan."""
    asked = Parser("plan", ABOUT).read_settings(arguments)
    return run_jobs(asked, [*QUIET, *asked.settings], work)


def work(job: Job) -> dict[str, Any]:
    """Plan one configuration, show the plan and return it."""
    from llmpipe.plan import plan
    from llmpipe.terminal import show_plan

    found = plan(job.config, job.directory)
    show_plan(found, job.directory)
    return found

"""What can be done with runs: the verbs of the command line, a file each.

A verb's module has `main(arguments)`, which does what is asked and returns the exit code, or None where it only printed
something. It is imported when it is asked for.

arguments.py   what a verb takes: options of its own, Hydra's flags, a run directory, KEY=VALUE
jobs.py        what Hydra makes of it: jobs, one or those of a sweep
former.py      keys that were there before the verbs
run.py, plan.py, resume.py, export.py, help.py, version.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple, cast

OK, REFUSED, SOME_ERRORS = 0, 1, 3
"""Exit codes: all went well; nothing was done, or it was stopped; some rows are errors."""

Main = Callable[[Sequence[str]], int | None]


class Verb(NamedTuple):
    """A verb as `--help` shows it."""

    takes: str
    summary: str


VERBS = {
    "run": Verb("[KEY=VALUE…]", "run a dataset through a model; the word run may be left out"),
    "plan": Verb("[KEY=VALUE…]", "check everything, load no weights, and say what a run would do and take"),
    "resume": Verb("DIR [KEY=VALUE…]", "go on with the run in a directory, with its own configuration"),
    "export": Verb("DIR [--to FILE] [--force] [KEY=VALUE…]", "write the answers that a run has so far to a file"),
    "help": Verb("[VERB]", "explain a verb, or every key"),
    "version": Verb("", "print the version"),
}


def main_of(verb: str) -> Main:
    """Return what does a verb."""
    return cast(Main, import_module(f"{__name__}.{verb}").main)

"""What a verb takes from the command line: options of its own, Hydra's flags, and words, in any order.

A word is a run directory, or a setting: KEY=VALUE. What stands behind `--` is a word, whatever it begins with.
"""

from __future__ import annotations

import argparse
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser

from llmpipe.config.checks import is_remote, readable, unknown_name
from llmpipe.config.escapes import as_override
from llmpipe.exceptions import LedgerError, LLMConfigError
from llmpipe.place import check_place
from llmpipe.quoting import quoted, shell_command
from llmpipe.replay import replayed
from llmpipe.verbs import VERBS
from llmpipe.verbs.former import refuse_former
from llmpipe.version import __version__

MODES = ("run", "multirun", "cfg", "shell_completion", "info")
"""Hydra's flags that choose what it does; they exclude each other."""
COMPLETION = ("install", "uninstall", "query")
"""What a shell's completion is asked to do, with the name of the shell."""
QUIET = ("hydra.output_subdir=null", "hydra/job_logging=terminal")
"""Settings with which Hydra leaves nothing in a run directory."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(conflict_handler="resolve", **options)
        self.add_argument("--version", action="version", version=f"llmpipe {__version__}", help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        raise LLMConfigError(f"{message}; see {self.prog} --help")


class Parser(_Parser):
    """A verb's own options; `add_argument` takes more.

    Args:
        verb: Its name.
        about: What `llmpipe VERB --help` says.
    """

    def __init__(self, verb: str, about: str) -> None:
        super().__init__(
            prog=f"llmpipe {verb}",
            usage=f"llmpipe {verb} {VERBS[verb].takes}".rstrip(),
            description=about,
            epilog="llmpipe --help explains every KEY, llmpipe --hydra-help Hydra's flags.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._verb = verb

    def read(self, arguments: Sequence[str]) -> Namespace:
        """Return the verb's own options, Hydra's flags, and `words`, without the verb itself.

        Raises:
            LLMConfigError: there is a flag that is not known, or flags that do not go together.
            SystemExit: help, or the version, was asked for and has been printed.
        """
        before, behind = _split(arguments)
        own, rest = self.parse_known_args(before)
        asked = _hydra_flags().parse_intermixed_args(rest)
        words = asked.overrides[1:] if asked.overrides[:1] == [self._verb] else asked.overrides
        modes = [f"--{mode.replace('_', '-')}" for mode in MODES if getattr(asked, mode)]
        if len(modes) > 1:
            self.error(f"{' and '.join(modes)} do not go together")
        if asked.resolve and asked.cfg is None:
            self.error("--resolve goes with --cfg")
        if asked.shell_completion and sum(word.partition("=")[0] in COMPLETION for word in words) != 1:
            self.error(f"--shell-completion goes with one of {', '.join(f'{word}=SHELL' for word in COMPLETION)}")
        if asked.config_path and "://" not in asked.config_path:
            if not Path(asked.config_path).is_dir():
                self.error(f"--config-path={quoted(asked.config_path)} is no directory: --config-name chooses a file")
            asked.config_path = os.path.abspath(asked.config_path)  # Hydra would look beside its caller
        if asked.experimental_rerun is not None and not Path(asked.experimental_rerun).is_file():
            self.error(f"--experimental-rerun={quoted(asked.experimental_rerun)} is no file")
        return Namespace(**{**vars(asked), **vars(own), "words": [*words, *behind]})

    def read_settings(self, arguments: Sequence[str], of_a_run: bool = False) -> Namespace:
        """Return the same with `settings` for words, and `directory` where the first word is to be a run's.

        Raises:
            LLMConfigError: also where a word is no setting, or there is no directory.
            SystemExit: as `read`.
        """
        asked = self.read(arguments)
        asked.directory, *asked.settings = asked.words if of_a_run and asked.words else ["", *asked.words]
        if of_a_run and not asked.directory:
            self.error("no run directory is named")
        for word in asked.settings:
            if word in VERBS:
                raise LLMConfigError(f"{word} is a verb, and stands before all KEY=VALUE: llmpipe {word} …")
            if not _is_setting(word):
                self.error(f"{quoted(word)} is no KEY=VALUE")
        refuse_former(asked.settings, arguments)
        return asked


def chosen(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the verb that the arguments ask for, which is their first word or else run, and what it is to read.

    Raises:
        LLMConfigError: the first word is neither a verb nor a setting.
    """
    before, _ = _split(arguments)
    words = _hydra_flags().parse_known_intermixed_args(before)[0].overrides
    if words and words[0] in VERBS:
        return words[0], arguments
    if {"-h", "--help"} & {*before}:
        return "help", []
    if words and not _is_setting(words[0]):
        if words[0] and Path(words[0]).is_dir():
            go_on = shell_command("resume", words[0])
            raise LLMConfigError(f"{quoted(words[0])} is a directory, and no verb; to go on with its run: {go_on}")
        raise LLMConfigError(unknown_name(words[0], VERBS, "verb"))
    return "run", arguments


def settings_of_run(asked: Namespace) -> list[str]:
    """Return the settings that the run in a directory was begun with, and above them the new ones.

    Args:
        asked: What `Parser.read_settings` has read.

    Raises:
        LLMConfigError: the directory cannot be here, or a sweep is asked for.
        LedgerError: it holds no run, or one with settings that a directory cannot give.
        LLMError: it has links where a run would write.
    """
    refuse_remote(asked.directory, quoted(asked.directory))
    if asked.multirun:
        raise LLMConfigError("--multirun has no meaning here: a run directory holds one run; take one after the other")
    with readable("DIR", asked.directory, LedgerError):
        directory = Path(asked.directory)
        if directory.exists():
            check_place(directory)
        before = replayed(directory, asked.settings)
    if "${" in str(directory.absolute()):
        raise LLMConfigError(f"{quoted(asked.directory)} has ${{ in its path, a reference for Hydra: rename it")
    # The directory keeps the config files that Hydra wrote when the run began.
    here = [as_override("hydra.run.dir", str(directory)), "hydra.output_subdir=null", "hydra.mode=RUN"]
    return [*before, *asked.settings, *here]


def refuse_remote(path: str, shown: str) -> None:
    """Refuse what is on another machine: a folder of that name would be made here.

    Raises:
        LLMConfigError: shows it as it was given.
    """
    if is_remote(path):
        raise LLMConfigError(f"{shown} is not supported yet: it must be on this machine; copy it from there")


def _is_setting(word: str) -> bool:
    return "=" in word or word.startswith("~")


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return what stands before `--`, and what behind."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    return list(arguments[:end]), list(arguments[end + 1 :])


def _hydra_flags() -> _Parser:
    return _Parser(prog="llmpipe", parents=[get_args_parser()], add_help=False)

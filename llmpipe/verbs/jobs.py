"""Jobs: each is one configuration that Hydra has composed, in a directory of its own; a sweep has several.

Hydra, or a launcher of its, calls the job, in this process or in another, to which the verb's work goes along.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import hydra.core.utils
from hydra import version
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from hydra.main import _get_rerun_conf
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmpipe.config import RunConfig, conf_dir, register_schemas, to_run_config
from llmpipe.config.escapes import text_of
from llmpipe.config.loading import check_configs, checked
from llmpipe.config.messages import in_words
from llmpipe.config.trust import key_of
from llmpipe.exceptions import LLMConfigError, LLMError, RunInterrupted
from llmpipe.place import check_place
from llmpipe.redaction import RedactedFormatter, redacted
from llmpipe.replay import composed_from, find_files, typed, with_files
from llmpipe.system.streams import usable_streams
from llmpipe.system.temporary import temporary_directory
from llmpipe.system.workers import become_worker, in_this_process, is_worker, passing_on
from llmpipe.verbs import OK, REFUSED, SOME_ERRORS, VERBS
from llmpipe.verbs.arguments import refuse_remote

log = logging.getLogger("llmpipe")

CONFIG_NAME = "config"
_DIRECTED = "|".join(name for name, verb in VERBS.items() if verb.takes.startswith("DIR"))
_BEHIND_A_VERB = re.compile(rf"^(\s*\S+\s+)(?:(?:{_DIRECTED})\s+\S+|{'|'.join(VERBS)})\s+")
"""The verb in a line that a shell completes, and its directory, of which Hydra knows nothing."""


class Job(NamedTuple):
    """What a verb's work is done with."""

    config: RunConfig
    directory: Path
    arguments: list[str]
    """What composes the configuration again."""


Work = Callable[[Job], dict[str, Any] | None]
"""Does what a verb is for, and returns what was found, whose `rows_error` decides the exit code. It can be pickled."""
Compare = Callable[[Sequence[tuple[list[str], dict[str, Any] | None]]], None]
"""Shows the jobs of a sweep: the settings of each, and what was found, or None where it failed."""


def run_jobs(flags: Namespace, settings: Sequence[str], work: Work, compare: Compare | None = None) -> int | None:
    """Have Hydra compose what is asked for, and do a verb's work with it.

    Args:
        flags: Hydra's.
        settings: KEY=VALUE; later ones stand above earlier ones.
        work: Done with each job.
        compare: Called at the end of a sweep.

    Returns:
        The exit code, or None where Hydra only printed something.

    Raises:
        RunInterrupted: a signal ended a job; no other was begun.
        LLMError, HydraException, OmegaConfBaseException, OSError: no job could begin, or there was none.
    """
    for setting in settings:
        if key_of(setting) in ("hydra.run.dir", "hydra.sweep.dir"):
            refuse_remote(text_of(setting), setting)
    with place_for_libraries(settings), passing_on(), checked(), looking_first():
        program = Program(work)
        register_schemas()
        try:
            _start(Namespace(**{**vars(flags), "overrides": list(settings)}), program)
        except SystemExit as end:  # Hydra's own, after --hydra-help
            if end.code:
                raise
        except Interrupted as interrupted:
            program.end(compare)
            raise interrupted.error from None
        code = program.end(compare)
        if code is None and flags.multirun and not flags.hydra_help:
            raise LLMConfigError("the sweep has no job: glob() finds options of a group, such as sampling=glob(*)")
        return code


def _start(flags: Namespace, program: Program) -> None:
    """Do what `hydra.main` does; that reads the flags from `sys.argv`, where they have to stand in one order."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra prints errors by itself, with a stack trace, and exits
    version.setbase("1.3")
    if flags.shell_completion and "COMP_LINE" in os.environ:
        os.environ["COMP_LINE"] = _BEHIND_A_VERB.sub(r"\1", os.environ["COMP_LINE"])
    if flags.experimental_rerun is not None:
        program.job(_get_rerun_conf(flags.experimental_rerun, flags.overrides))
    else:
        _run_hydra(flags, get_args_parser(), program.job, str(conf_dir()), CONFIG_NAME)


class Interrupted(BaseException):
    """Ends the command, a sweep's remaining jobs included: Hydra goes on after an `Exception`.

    Args:
        error: What ended the job that ran.
    """

    def __init__(self, error: RunInterrupted) -> None:
        self.error = error
        super().__init__(error)


@contextmanager
def looking_first() -> Iterator[None]:
    """Have Hydra look at each job's directory before it opens a file in it."""
    hydra.core.utils.configure_log = look_first
    try:
        yield
    finally:
        hydra.core.utils.configure_log = configure_log


def look_first(log_config: DictConfig, verbose_config: bool | str | Sequence[str] = False) -> None:
    """Look at a job's directory, and then do what Hydra's `configure_log` does: the first that opens a file there.

    Raises:
        LLMError: something there leads elsewhere, or is another program's.
    """
    job: Any = HydraConfig.get() if HydraConfig.initialized() else None
    # Launchers call this before a job has a directory, too.
    if job is not None and not OmegaConf.is_missing(job.runtime, "output_dir"):
        check_directory(job, log_config)
    configure_log(log_config, verbose_config)


def check_directory(job: Any, log_config: DictConfig) -> None:
    """Refuse links, and files of other programs, where Hydra is going to write for a job.

    Args:
        job: The job's node of Hydra's.
        log_config: Its loggers.

    Raises:
        LLMError: names what is there.
    """
    place, configs = Path(job.runtime.output_dir), []
    if job.output_subdir is not None:
        # The pickles are written by a callback of Hydra's own, which any group may choose.
        names = ("config.yaml", "hydra.yaml", "overrides.yaml", "config.pickle", "job_return.pickle")
        configs = [place / job.output_subdir / name for name in names]
    logging_config: Any = OmegaConf.to_container(log_config, resolve=True) if log_config is not None else {}
    handlers = logging_config.get("handlers", {}).values()
    logs = [Path(handler["filename"]).absolute() for handler in handlers if handler.get("filename")]
    within = Path(job.runtime.cwd, job.sweep.dir) if job.mode is RunMode.MULTIRUN else None
    check_place(place, [*configs, *logs], within)
    if configs:
        check_configs(configs[0])


class Outcome(NamedTuple):
    """What came of one job."""

    exit_code: int
    settings: list[str]
    found: dict[str, Any] | None
    """What the job found, such as its metrics; None where it was refused or stopped."""


_outcomes: dict[int, Outcome] = {}
"""The outcomes of a sweep's jobs, by their numbers."""


class Found(dict[str, Any]):
    """What a job of a sweep returns. Making or unpickling it notes the job's outcome in the process where that is done.

    Args:
        found: What was found.
        number: Of the job.
        outcome: What came of it.
    """

    def __init__(self, found: dict[str, Any], number: int, outcome: Outcome) -> None:
        super().__init__(found)
        self._number, self._outcome = number, outcome
        _outcomes[number] = outcome

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any], int, Outcome]]:
        return type(self), (dict(self), self._number, self._outcome)


class Program:
    """The jobs of one command: one, or several with `--multirun`, which a launcher may run in other processes.

    Args:
        work: What is done with each.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._exit_code: int | None = None
        _outcomes.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"work": self._work, "command": os.getpid()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._work = state["work"]
        self._exit_code = None
        become_worker(state["command"])
        hydra.core.utils.configure_log = look_first  # for as long as the process lives

    def job(self, composed: DictConfig) -> dict[str, Any] | None:
        """Work on one composed configuration; Hydra calls this for each job, and a failed one does not end a sweep."""
        job = HydraConfig.get()
        for handler in logging.getLogger().handlers:  # of whichever job_logging was chosen
            handler.setFormatter(RedactedFormatter(handler.formatter))
        mention_sweep(job)
        self._exit_code, found = REFUSED, None
        try:
            with usable_streams(), in_this_process():
                found = self._work(job_of(composed, job))
            self._exit_code = SOME_ERRORS if found is not None and found["rows_error"] else OK
        except RunInterrupted as error:
            if is_worker():  # the command says it, and no other job is begun here
                logging.shutdown()
                os._exit(128 + error.signum)
            raise Interrupted(error) from error
        except (LLMError, OSError, OmegaConfBaseException) as error:
            log.error("llmpipe: %s", in_words(error))
        except Exception as error:  # the command shows it: another process, perhaps, that was never told what to hide
            error.args = redacted(error.args)
            raise
        if job.mode is RunMode.MULTIRUN:
            return Found(found or {}, job.job.num, Outcome(self._exit_code, typed(job), found))
        return found

    def end(self, compare: Compare | None) -> int | None:
        """Show the jobs of a sweep beside each other, and return the exit code of the whole command, if it had jobs."""
        outcomes = [outcome for _, outcome in sorted(_outcomes.items())]
        if compare is not None and len(outcomes) > 1:
            compare([(outcome.settings, outcome.found) for outcome in outcomes])
        codes = {outcome.exit_code for outcome in outcomes}
        return self._exit_code if not codes else REFUSED if REFUSED in codes else max(codes)


def mention_sweep(job: Any) -> None:
    """Say that a group, such as an experiment, asks for a sweep where there is one job.

    Args:
        job: The job's node of Hydra's.
    """
    params = OmegaConf.select(job, "sweeper.params")
    if job.mode is RunMode.MULTIRUN or not params:
        return
    written: Any = OmegaConf.to_container(params, resolve=False)
    given = {*map(key_of, typed(job))}
    asked = [f"{key}={value}" for key, value in written.items() if key not in given]
    if asked:
        log.warning("%s is for a sweep, and this is one run: add -m", " ".join(asked))


def job_of(composed: DictConfig, job: Any) -> Job:
    """Return what a verb works with.

    Args:
        composed: A job's configuration, without Hydra's node.
        job: That node.
    """
    config = to_run_config(composed, typed(job), job.job.config_name, job.runtime.config_sources)
    arguments = composed_from(composed, job)
    if job.job.chdir:  # what is read is named from where the command was given all the same
        find_files(vars(config), job.runtime.cwd)
        arguments = [with_files(text, job.runtime.cwd) for text in arguments]
    if config.trusted_modules and job.runtime.cwd not in sys.path:
        sys.path.append(job.runtime.cwd)  # as `python -m llmpipe` has it, but behind what is installed
    return Job(config, Path(job.runtime.output_dir), arguments)


@contextmanager
def place_for_libraries(settings: Sequence[str]) -> Iterator[None]:
    """Where no temporary file can be made, let libraries make theirs in the run directory, and clear it at the end."""
    given = {setting.partition("=")[0]: text_of(setting) for setting in settings}
    place = given.get("hydra.run.dir") or given.get("hydra.sweep.dir")
    try:
        tempfile.gettempdir()
    except OSError:
        if place is not None:  # else nothing can be run, and what only prints needs none
            os.makedirs(place, exist_ok=True)
            with temporary_directory(Path(place).absolute()) as made:
                os.environ["TMPDIR"] = str(made)
                yield
            return
    yield

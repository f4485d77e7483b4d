"""The command line: argv → Hydra → pipeline → exit code.

Exit codes: 0 every row ok; 1 the run could not start, was refused, or was stopped by a fault or by errors, resumable; 3
finished, some rows are errors; 129, 130 and 143 interrupted by SIGHUP, SIGINT and SIGTERM, resumable.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmpipe.config import conf_dir, register_schemas, to_run_config
from llmpipe.config.checks import is_remote, readable
from llmpipe.config.escapes import as_override, text_of
from llmpipe.config.loading import check_configs, checked
from llmpipe.config.messages import in_words
from llmpipe.config.trust import key_of
from llmpipe.exceptions import LedgerError, LLMConfigError, LLMError, RunInterrupted
from llmpipe.help import help_text
from llmpipe.ledger import begun
from llmpipe.place import check_place
from llmpipe.redaction import RedactedFormatter, redacted
from llmpipe.replay import composed_from, replayed, typed
from llmpipe.streams import lost, usable_streams
from llmpipe.temporary import temporary_directory
from llmpipe.text import harmless
from llmpipe.version import __version__
from llmpipe.workers import become_worker, in_this_process, is_worker, passing_on

log = logging.getLogger("llmpipe")

OK, REFUSED, SOME_ERRORS = 0, 1, 3
CONFIG_NAME = "config"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)
LOCAL = ("hydra.run.dir", "hydra.sweep.dir", "resume", "export", "export_to")
"""What names a place to read or write a run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    with usable_streams():
        return command(list(sys.argv[1:] if argv is None else argv))


def command(arguments: list[str]) -> int:
    """Do what the arguments ask for and return the exit code."""
    if arguments == ["--version"]:
        print(f"llmpipe {__version__}")
        return REFUSED if lost() else OK
    try:
        Path.home()
    except RuntimeError:  # an unknown user; libraries would make a directory named ~
        os.environ["HOME"] = "/nonexistent"
    sys.excepthook = show_fault
    logging.raiseExceptions = False  # a log that cannot be written is no reason to fill the terminal
    try:
        check_local(arguments)
        arguments = without_traces(flags_first(resumed(arguments)))
        with place_for_libraries(arguments), passing_on():
            program = Program()
            sys.argv[1:] = arguments
            register_schemas()
            # Otherwise Hydra prints errors by itself, with a stack trace, and exits.
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")
            try:
                with checked():
                    hydra.main(config_path=str(conf_dir()), config_name=CONFIG_NAME, version_base="1.3")(program.job)()
            except SystemExit as end:  # Hydra's own, after --help
                if end.code:
                    raise
            except Refused as refused:
                print(f"llmpipe: {harmless(str(refused))}", file=sys.stderr)
                return REFUSED
            except Interrupted as interrupted:
                program.end()
                print(f"llmpipe: {in_words(interrupted.error)}", file=sys.stderr)
                return 128 + interrupted.error.signum
            return program.end()
    except (LLMError, HydraException, OmegaConfBaseException, OSError, ValueError) as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(error, LLMError):  # the log that cannot be opened, by Hydra
            error = cause
        elif type(error) is ValueError and "--" not in str(error):
            raise  # not Hydra's complaint about flags: a bug of ours
        if isinstance(error, OSError) and error.filename is not None and not isinstance(error, HydraException):
            error = named(error)
        elif isinstance(error, OSError) and error.errno in FULL:  # Hydra's configuration, half written
            error = LLMError(f"cannot write to the run directory: {error.strerror}; choose another hydra.run.dir")
        print(f"llmpipe: {in_words(error)}", file=sys.stderr)
        return REFUSED
    except BrokenExecutor:
        print(
            "llmpipe: a process of the sweep has died; each job goes on with llmpipe resume=ITS_DIRECTORY",
            file=sys.stderr,
        )
        return REFUSED
    except KeyboardInterrupt as interrupt:
        signum = getattr(interrupt, "signum", signal.SIGINT)
        by = f"interrupted by {signal.Signals(signum).name}"
        print(f"llmpipe: {by}; a run that had begun continues with llmpipe resume=DIRECTORY", file=sys.stderr)
        return 128 + signum


def named(error: OSError) -> LLMError:
    """Say what Hydra could not do: it reads its YAML files, and writes to the run directory, before a job begins."""
    file = Path(os.fsdecode(error.filename))
    why = f"{file}: {error.strerror}"
    in_a_job = any(frame.name == "run_job" for frame in traceback.extract_tb(error.__traceback__))
    if file.suffix in (".yaml", ".yml") and file.name != "multirun.yaml" and not in_a_job:
        return LLMConfigError(f"cannot read a configuration: {why}")
    return LLMError(f"cannot write to the run directory: {why}; choose another hydra.run.dir")


def show_fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print what nobody expected as Python does, without what came from the environment."""
    print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


class Interrupted(BaseException):
    """Ends the command, a sweep's remaining jobs included: Hydra goes on after an `Exception`.

    Args:
        error: What ended the job that ran.
    """

    def __init__(self, error: RunInterrupted) -> None:
        self.error = error
        super().__init__(error)


class Refused(BaseException):
    """Ends the command before Hydra writes where it should not; it would wrap an `Exception` in words of its own."""


def entered(directory: str, change: Any) -> Any:
    """Look at a run directory when Hydra has made it, and opens no file in it yet: `hydra.job.chdir` asks for this.

    Args:
        directory: The run directory, as an absolute path.
        change: What `hydra.job.chdir` is to be.

    Raises:
        Refused: something there leads elsewhere, or is another program's.
    """
    job = HydraConfig.get()
    place, configs = Path(directory), []
    if job.output_subdir is not None:
        # The pickles are written by a callback of Hydra's own, which any group may choose.
        names = ("config.yaml", "hydra.yaml", "overrides.yaml", "config.pickle", "job_return.pickle")
        configs = [place / job.output_subdir / name for name in names]
    logging_config: Any = OmegaConf.to_container(job.job_logging, resolve=True)
    handlers = (logging_config or {}).get("handlers", {}).values()
    logs = [Path(handler["filename"]).absolute() for handler in handlers if handler.get("filename")]
    within = Path(job.sweep.dir).absolute() if job.mode is RunMode.MULTIRUN else None
    try:
        check_place(place, [*configs, *logs], within)
        if configs:
            check_configs(configs[0])
    except LLMError as error:
        raise Refused(str(error)) from error
    return change


def register_resolvers() -> None:
    """Make known what the configuration asks by name."""
    OmegaConf.register_new_resolver("llmpipe.help", help_text, replace=True)
    OmegaConf.register_new_resolver("llmpipe.entered", entered, replace=True)


class Outcome(NamedTuple):
    """What came of one job."""

    exit_code: int
    overrides: list[str]
    metrics: dict[str, Any] | None
    """Of a finished run; None of one that was refused or stopped."""


_outcomes: dict[int, Outcome] = {}
"""Of the jobs of a sweep, by their numbers."""


class Found(dict[str, Any]):
    """What a job of a sweep returns, with what came of it, which is noted in each process that it comes to.

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
    """The jobs of one command: one, or several with `--multirun`, which a launcher may run in other processes."""

    def __init__(self) -> None:
        self._exit_code: int | None = None
        _outcomes.clear()
        register_resolvers()

    def __getstate__(self) -> dict[str, Any]:
        return {"_exit_code": None, "command": os.getpid()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._exit_code = None
        become_worker(state["command"])
        register_resolvers()

    def job(self, composed: DictConfig) -> dict[str, Any] | None:
        """Run one composed configuration; Hydra calls this for each job, and a failed one does not end a sweep."""
        job = HydraConfig.get()
        for handler in logging.getLogger().handlers:  # of whichever job_logging was chosen
            handler.setFormatter(RedactedFormatter(handler.formatter))
        self._exit_code, found, metrics = REFUSED, None, None
        try:
            with usable_streams(), in_this_process():
                found, metrics = self._do(composed, job)
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
            return Found(found or {}, job.job.num, Outcome(self._exit_code, typed(job), metrics))
        return found

    def _do(self, composed: DictConfig, job: Any) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Do what is asked for and show it; return what was found, and the metrics where a run ended."""
        from llmpipe.export import export
        from llmpipe.pipeline import run
        from llmpipe.plan import plan
        from llmpipe.terminal import ProgressBar, show_export, show_plan, show_summary

        directory = Path(job.runtime.output_dir)
        config = to_run_config(composed, typed(job), job.job.config_name, job.runtime.config_sources)
        if config.trusted_modules and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # as `python -m llmpipe` has it, but behind what is installed
        if config.export is not None:
            show_export(*export(config, config.export, config.export_to))
            return None, None
        if config.plan:
            found = plan(config, directory)
            show_plan(found, directory)
            return found, None
        with ProgressBar() as bar:
            metrics = run(config, directory, bar.update, arguments=composed_from(composed, job))
        show_summary(metrics, directory)
        return metrics, metrics

    def end(self) -> int:
        """Print the runs of a sweep beside each other, and return the exit code of the whole command."""
        from llmpipe.terminal import show_comparison

        outcomes = [outcome for _, outcome in sorted(_outcomes.items())]
        if len(outcomes) > 1 and any(outcome.metrics for outcome in outcomes):
            show_comparison([(outcome.overrides, outcome.metrics) for outcome in outcomes])
        if not outcomes and self._exit_code is None:  # nothing was to be done but to print
            return REFUSED if lost() else OK
        codes = {outcome.exit_code for outcome in outcomes} or {self._exit_code or OK}
        return REFUSED if REFUSED in codes else max(codes)


@contextmanager
def place_for_libraries(arguments: list[str]) -> Iterator[None]:
    """Where no temporary file can be made, let libraries make theirs in the run directory, and clear it at the end."""
    given = texts(arguments)
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


def check_local(arguments: list[str]) -> None:
    """Refuse run directories on other machines: Hydra would make a folder of that name.

    Raises:
        LLMConfigError: names the argument.
    """
    for argument in arguments:
        key = key_of(argument)
        if key in LOCAL and is_remote(text_of(argument)):
            raise LLMConfigError(f"{argument} is not supported yet: it must be on this machine; copy it from there")


def texts(arguments: list[str]) -> dict[str, str]:
    """Return what the arguments set, by their keys, as Hydra has it."""
    return {argument.partition("=")[0]: text_of(argument) for argument in arguments}


def flags_first(arguments: list[str]) -> list[str]:
    """Put flags before overrides, which Hydra takes in one row only, and to which more are added here."""
    overrides = get_args_parser().parse_intermixed_args(arguments).overrides
    return [*(argument for argument in arguments if argument not in overrides), *overrides]


def resumed(arguments: list[str]) -> list[str]:
    """Put the arguments of a run beside `resume=DIRECTORY` or `export=DIRECTORY`; new ones stand above them.

    Raises:
        LedgerError: the directory holds no run.
    """
    places = [i for i, text in enumerate(arguments) if text.lstrip("+").startswith(("resume=", "export="))]
    verb, _, name = arguments[places[-1]].lstrip("+").partition("=") if places else ("", "", "null")
    if not name:
        raise LLMConfigError(f"{verb}= names no run directory")
    if name == "null":
        return arguments
    if not os.path.lexists(name):  # a directory's name needs no quotes of Hydra's here, but may have them
        name = text_of(arguments[places[-1]])
    with readable(verb, name, LedgerError):
        directory = Path(name).expanduser()
        if directory.exists():
            check_place(directory)
        given = [argument for i, argument in enumerate(arguments) if i not in places]
        before = replayed(directory, given)
    # The directory keeps the config files that Hydra wrote when the run began.
    place = [as_override(key, str(directory)) for key in (verb, "hydra.run.dir")]
    return [*before, *given, *place, "hydra.output_subdir=null"]


def without_traces(arguments: list[str]) -> list[str]:
    """Keep Hydra from writing where nothing is run (`plan=true`, `export=`), and the `.hydra` of a run as it was."""
    given = texts(arguments)
    continues = "hydra.run.dir" in given and begun(Path(given["hydra.run.dir"]).expanduser())
    if continues and "hydra.output_subdir" not in given:
        arguments = [*arguments, "hydra.output_subdir=null"]
        given["hydra.output_subdir"] = "null"
    plans = given.get("plan", "").lower() in ("true", "yes", "on", "1")
    if not plans and given.get("export", "") in ("", "null"):
        return arguments
    quiet = {"hydra.output_subdir": "null", "hydra/job_logging": "terminal"}
    return [*arguments, *(f"{name}={value}" for name, value in quiet.items() if name not in given)]

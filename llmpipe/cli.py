"""The command line: argv → Hydra → pipeline → exit code.

Exit codes: 0 every row ok; 1 the run could not start, was refused, or was stopped by a fault or by errors, resumable; 3
finished, some rows are errors; 129, 130 and 143 interrupted by SIGHUP, SIGINT and SIGTERM, resumable.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmpipe import __version__
from llmpipe.config import conf_dir, register_schemas, to_run_config
from llmpipe.config.checks import is_remote
from llmpipe.config.messages import one_line
from llmpipe.exceptions import LLMConfigError, LLMError, RunInterrupted
from llmpipe.help import help_text
from llmpipe.ledger import FILE, saved_arguments
from llmpipe.redaction import RedactedFormatter, redacted
from llmpipe.streams import lost, usable_streams

log = logging.getLogger("llmpipe")

OK, REFUSED, SOME_ERRORS = 0, 1, 3
CONFIG_NAME = "config"
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
        arguments = without_traces(resumed(arguments))
        with temporary_directory(arguments) as outcomes:
            program = Program(outcomes)
            sys.argv[1:] = arguments
            register_schemas()
            OmegaConf.register_new_resolver("llmpipe.help", help_text, replace=True)
            # Otherwise Hydra prints errors by itself, with a stack trace, and exits.
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")
            try:
                hydra.main(config_path=str(conf_dir()), config_name=CONFIG_NAME, version_base="1.3")(program.job)()
            except SystemExit as end:  # Hydra's own, after --help
                if end.code:
                    raise
            except Interrupted as interrupted:
                program.end()
                print(f"llmpipe: {one_line(interrupted.error)}", file=sys.stderr)
                return 128 + interrupted.error.signum
            return program.end()
    except (LLMError, HydraException, OmegaConfBaseException, OSError, ValueError) as error:
        if isinstance(error.__cause__, OSError):  # the log that cannot be opened, in Hydra's words
            error = error.__cause__
        elif type(error) is ValueError and "--" not in str(error):
            raise  # not Hydra's complaint about flags: a bug of ours
        if isinstance(error, OSError) and error.filename is not None and not isinstance(error, HydraException):
            why = f"{error.filename}: {error.strerror}"
            error = LLMError(f"cannot write to the run directory: {why}; choose another hydra.run.dir")
        print(f"llmpipe: {one_line(error)}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("llmpipe: interrupted; a run that had begun continues with llmpipe resume=DIRECTORY", file=sys.stderr)
        return 130


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


class Outcome(NamedTuple):
    """What came of one job."""

    exit_code: int
    overrides: list[str]
    metrics: dict[str, Any] | None
    """Of a finished run; None of one that was refused or stopped."""


class Program:
    """The jobs of one command: one, or several with `--multirun`.

    Args:
        outcomes: A directory for what came of each job of a sweep: a launcher may run them in other processes.
    """

    def __init__(self, outcomes: Path) -> None:
        self._directory = outcomes
        self._exit_code: int | None = None

    def job(self, composed: DictConfig) -> dict[str, Any] | None:
        """Run one composed configuration; Hydra calls this for each job, and a failed one does not end a sweep."""
        job = HydraConfig.get()
        for handler in logging.getLogger().handlers:  # of whichever job_logging was chosen
            handler.setFormatter(RedactedFormatter(handler.formatter))
        self._exit_code, found, metrics = REFUSED, None, None
        try:
            with usable_streams():  # a launcher may run it in another process
                found, metrics = self._do(composed, job)
            self._exit_code = SOME_ERRORS if found is not None and found["rows_error"] else OK
        except RunInterrupted as error:
            raise Interrupted(error) from error
        except LLMError as error:
            log.error("llmpipe: %s", one_line(error))
        if job.mode is RunMode.MULTIRUN:
            outcome = Outcome(self._exit_code, typed(job), metrics)
            (self._directory / f"job-{job.job.num:06}").write_text(json.dumps(outcome._asdict()), "ascii")
        return found

    def _do(self, composed: DictConfig, job: Any) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Do what is asked for and show it; return what was found, and the metrics where a run ended."""
        from llmpipe.export import export
        from llmpipe.pipeline import run
        from llmpipe.plan import plan
        from llmpipe.terminal import ProgressBar, show_export, show_plan, show_summary

        directory = Path(job.runtime.output_dir)
        config = to_run_config(composed, typed(job))
        config.trusted_modules = trusted_modules()
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
            metrics = run(config, directory, bar.update, arguments=composed_from(job))
        show_summary(metrics, directory)
        return metrics, metrics

    def end(self) -> int:
        """Print the runs of a sweep beside each other, and return the exit code of the whole command."""
        from llmpipe.terminal import show_comparison

        outcomes = [Outcome(**json.loads(file.read_bytes())) for file in sorted(self._directory.glob("job-*"))]
        if len(outcomes) > 1 and any(outcome.metrics for outcome in outcomes):
            show_comparison([(outcome.overrides, outcome.metrics) for outcome in outcomes])
        if not outcomes and self._exit_code is None:  # nothing was to be done but to print
            return REFUSED if lost() else OK
        codes = {outcome.exit_code for outcome in outcomes} or {self._exit_code or OK}
        return REFUSED if REFUSED in codes else max(codes)


@contextmanager
def temporary_directory(arguments: list[str]) -> Iterator[Path]:
    """Make a directory for the time of the command; in its run directory where nothing else can be written.

    Then it is also the place for the temporary files of libraries.
    """
    place = None
    try:
        tempfile.gettempdir()
    except OSError:
        given = dict(argument.partition("=")[::2] for argument in arguments)
        place = given.get("hydra.run.dir") or given.get("hydra.sweep.dir")
        if place is None:  # nothing can be run then, and what only prints needs none
            yield Path(os.devnull)
            return
        os.makedirs(place, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="llmpipe-", dir=place) as made:
        if place is not None:
            os.environ["TMPDIR"] = os.path.abspath(made)
        yield Path(made)


def check_local(arguments: list[str]) -> None:
    """Refuse run directories on other machines: Hydra would make a folder of that name.

    Raises:
        LLMConfigError: names the argument.
    """
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.lstrip("+") in LOCAL and is_remote(value.strip("\"'")):
            raise LLMConfigError(f"{argument} is not supported yet: it must be on this machine; copy it from there")


def resumed(arguments: list[str]) -> list[str]:
    """Put the arguments of a run beside `resume=DIRECTORY` or `export=DIRECTORY`; new ones stand above them.

    Raises:
        LedgerError: the directory holds no run.
    """
    places = [i for i, argument in enumerate(arguments) if argument.startswith(("resume=", "export="))]
    verb, _, name = arguments[places[-1]].partition("=") if places else ("", "", "null")
    if not name:
        raise LLMConfigError(f"{verb}= names no run directory")
    if name == "null":
        return arguments
    directory = Path(name).expanduser()
    given = [argument for i, argument in enumerate(arguments) if i not in places]
    names = {_key(argument) for argument in given} | {"resume", "export", "hydra.run.dir"}
    before = [text for text in saved_arguments(directory) if _key(text) not in names]
    # The directory keeps the config files that Hydra wrote when the run began.
    return [*before, *given, f"{verb}={directory}", f"hydra.run.dir={directory}", "hydra.output_subdir=null"]


def without_traces(arguments: list[str]) -> list[str]:
    """Keep Hydra from writing where nothing is run (`plan=true`, `export=`), and the `.hydra` of a run as it was."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    begun = "hydra.run.dir" in given and (Path(given["hydra.run.dir"]).expanduser() / FILE).exists()
    if begun and "hydra.output_subdir" not in given:
        arguments = [*arguments, "hydra.output_subdir=null"]
        given["hydra.output_subdir"] = "null"
    plans = given.get("plan", "").lower() in ("true", "yes", "on", "1")
    if not plans and given.get("export", "") in ("", "null"):
        return arguments
    quiet = {"hydra.output_subdir": "null", "hydra/job_logging": "terminal"}
    return [*arguments, *(f"{name}={value}" for name, value in quiet.items() if name not in given)]


def composed_from(job: Any) -> list[str]:
    """Return the arguments that compose the running job again: overrides, and flags that say where files are."""
    flags = [f"--config-name={job.job.config_name}"] if job.job.config_name != CONFIG_NAME else []
    flags += [f"--config-dir={s.path}" for s in job.runtime.config_sources if s.provider == "command-line"]
    return [*flags, *typed(job)]


def typed(job: Any) -> list[str]:
    """Return the overrides of the running job as they were typed; what is read one by one, OmegaConf resolves."""
    return cast(list[str], OmegaConf.to_container(job.overrides.task, resolve=False))


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def trusted_modules() -> list[str]:
    """Return what the command line, or else the primary config file itself, trusts.

    A config group must not be able to trust its own `_target_`, so the composed value is not asked.
    """
    job = HydraConfig.get()
    for override in reversed(typed(job)):
        if _key(override) == "trusted_modules":
            return list(OmegaConf.from_dotlist([override.lstrip("+")])["trusted_modules"] or [])
    for source in job.runtime.config_sources:
        primary = Path(source.path) / f"{job.job.config_name}.yaml"
        if source.schema == "file" and primary.is_file():
            return list(OmegaConf.to_container(OmegaConf.load(primary)).get("trusted_modules") or [])  # type: ignore[union-attr]
    return []

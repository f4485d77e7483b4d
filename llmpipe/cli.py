"""The command line: argv → Hydra → pipeline → exit code.

Exit codes: 0 every row ok; 1 the run could not start, was refused, or was stopped by a fault or by errors, resumable; 3
finished, some rows are errors; 130 and 143 interrupted by SIGINT and SIGTERM, resumable.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import orjson
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmpipe.config import (
    BACKENDS,
    BackendConfig,
    RunConfig,
    conf_dir,
    field_docs,
    register_schemas,
    to_run_config,
    unknown_name,
)
from llmpipe.exceptions import LLMError, RunInterrupted
from llmpipe.ledger import saved_arguments
from llmpipe.records import harmless

log = logging.getLogger("llmpipe")

OK, REFUSED, SOME_ERRORS = 0, 1, 3
CONFIG_NAME = "config"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.raiseExceptions = False  # a log that cannot be written is no reason to fill the terminal
    try:
        with tempfile.TemporaryDirectory(prefix="llmpipe-") as outcomes:
            program = Program(Path(outcomes))
            sys.argv[1:] = without_traces(resumed(arguments))
            register_schemas()
            OmegaConf.register_new_resolver("llmpipe.help", help_text, replace=True)
            # Otherwise Hydra prints errors by itself, with a stack trace, and exits.
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")
            hydra.main(config_path=str(conf_dir()), config_name=CONFIG_NAME, version_base="1.3")(program.job)()
            return program.end()
    except (LLMError, HydraException, OmegaConfBaseException, OSError, ValueError) as error:
        if type(error) is ValueError and "--" not in str(error):
            raise  # not Hydra's complaint about flags: a bug of ours
        print(f"llmpipe: {one_line(error)}", file=sys.stderr)
        return 128 + error.signum if isinstance(error, RunInterrupted) else REFUSED
    except KeyboardInterrupt:
        print("llmpipe: interrupted; a run that had begun continues with llmpipe resume=DIRECTORY", file=sys.stderr)
        return 130


class Outcome(NamedTuple):
    """What came of one job."""

    exit_code: int
    overrides: list[str]
    metrics: dict[str, Any] | None
    """Of a finished run."""


class Program:
    """The jobs of one command: one, or several with `--multirun`.

    Args:
        outcomes: A directory for what came of each job of a sweep: a launcher may run them in other processes.
    """

    def __init__(self, outcomes: Path) -> None:
        self._directory = outcomes
        self._exit_code = OK

    def job(self, composed: DictConfig) -> dict[str, Any] | None:
        """Run one composed configuration; Hydra calls this for each job, and a failed one does not end a sweep."""
        job = HydraConfig.get()
        self._exit_code, found, metrics = REFUSED, None, None
        try:
            found, metrics = self._do(composed, job)
            self._exit_code = SOME_ERRORS if found is not None and found["rows_error"] else OK
        except RunInterrupted:
            raise
        except LLMError as error:
            print(f"llmpipe: {one_line(error)}", file=sys.stderr)
        if job.mode is RunMode.MULTIRUN:
            outcome = Outcome(self._exit_code, list(job.overrides.task), metrics)
            (self._directory / f"{job.job.num:06}").write_bytes(orjson.dumps(outcome._asdict()))
        return found

    def _do(self, composed: DictConfig, job: Any) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Do what is asked for and show it; return what was found, and the metrics where a run ended."""
        from llmpipe.export import export
        from llmpipe.pipeline import run
        from llmpipe.plan import plan
        from llmpipe.terminal import ProgressBar, show_export, show_plan, show_summary

        directory = Path(job.runtime.output_dir)
        config = to_run_config(composed)
        config.trusted_modules = trusted_modules()
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

        outcomes = [Outcome(**orjson.loads(file.read_bytes())) for file in sorted(self._directory.iterdir())]
        runs = [(outcome.overrides, outcome.metrics) for outcome in outcomes if outcome.metrics is not None]
        if len(runs) > 1:
            show_comparison(runs)
        codes = {outcome.exit_code for outcome in outcomes} or {self._exit_code}
        return REFUSED if REFUSED in codes else max(codes)


def resumed(arguments: list[str]) -> list[str]:
    """Put the arguments of a run beside `resume=DIRECTORY` or `export=DIRECTORY`; new ones stand above them.

    Raises:
        LedgerError: the directory holds no run.
    """
    places = [i for i, argument in enumerate(arguments) if argument.startswith(("resume=", "export="))]
    if not places or arguments[places[-1]].partition("=")[2] in ("", "null"):
        return arguments
    verb, _, name = arguments[places[-1]].partition("=")
    directory = Path(name).expanduser()
    given = [argument for i, argument in enumerate(arguments) if i not in places]
    names = {_key(argument) for argument in given} | {"resume", "export", "hydra.run.dir"}
    before = [text for text in saved_arguments(directory) if _key(text) not in names]
    # The directory keeps the config files that Hydra wrote when the run began.
    return [*before, *given, f"{verb}={directory}", f"hydra.run.dir={directory}", "hydra.output_subdir=null"]


def without_traces(arguments: list[str]) -> list[str]:
    """Keep Hydra from writing into the run directory where nothing is run: with `plan=true` and `export=`."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    plans = given.get("plan", "").lower() in ("true", "yes", "on", "1")
    if not plans and given.get("export", "") in ("", "null"):
        return arguments
    quiet = {"hydra.output_subdir": "null", "hydra/job_logging": "terminal"}
    return [*arguments, *(f"{name}={value}" for name, value in quiet.items() if name not in given)]


def composed_from(job: Any) -> list[str]:
    """Return the arguments that compose the running job again: overrides, and flags that say where files are."""
    flags = [f"--config-name={job.job.config_name}"] if job.job.config_name != CONFIG_NAME else []
    flags += [f"--config-dir={s.path}" for s in job.runtime.config_sources if s.provider == "command-line"]
    return [*flags, *job.overrides.task]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def trusted_modules() -> list[str]:
    """Return what the command line, or else the primary config file itself, trusts.

    A config group must not be able to trust its own `_target_`, so the composed value is not asked.
    """
    job = HydraConfig.get()
    for override in reversed(job.overrides.task):
        if _key(override) == "trusted_modules":
            return list(OmegaConf.from_dotlist([override.lstrip("+")])["trusted_modules"] or [])
    for source in job.runtime.config_sources:
        primary = Path(source.path) / f"{job.job.config_name}.yaml"
        if source.schema == "file" and primary.is_file():
            return list(OmegaConf.to_container(OmegaConf.load(primary)).get("trusted_modules") or [])  # type: ignore[union-attr]
    return []


# --- what Hydra shows -------------------------------------------------------------------------------------------------


def one_line(error: Exception) -> str:
    """Return an error as one readable line; an unknown key is followed by those there are."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OmegaConfBaseException) and cause.full_key is not None):
        cause = cause.__cause__
    if isinstance(cause, OmegaConfBaseException):
        parent = cause.parent_node
        known = list(parent) if isinstance(parent, DictConfig) and not parent._is_missing() else []
        if known and cause.key not in known:
            where = str(cause.full_key).rpartition(".")[0]
            return unknown_name(cause.key, map(str, known), f"key in {where}" if where else "key")
        return f"{cause.full_key}: {(cause.msg or str(cause)).splitlines()[0]}"
    return harmless(" ".join(str(error).split()))


def help_text() -> str:
    """Return the text of `--help`: the groups, and what each key means."""
    lines = [
        "llmpipe: an offline batch runner for language models.",
        "",
        "  llmpipe backend=transformers device=cuda",
        "  llmpipe dataset.path=prompts.jsonl sampling.max_tokens=100 output=parquet",
        "  llmpipe -m sampling.temperature=0,0.7,1.2",
        "  llmpipe plan=true dataset.path=prompts.jsonl",
        "  llmpipe resume=outputs/2026-01-31/12-00-00",
        "  llmpipe export=outputs/2026-01-31/12-00-00 export_to=so-far.parquet",
        "",
        "Choose one option per group (group=option):",
        "",
    ]
    for group in ("backend", "device", "sampling", "dataset", "prompt", "output", "metrics", "experiment"):
        options = sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))
        sign = "+" if group == "experiment" else " "
        lines.append(f"  {sign}{group + '=':<12}{'|'.join(options)}")
    lines += ["", "Change any key (key=value); after each, its default:", ""]
    for field in fields(RunConfig):
        lines += _help_of(RunConfig, field.name)
    lines += [
        "hydra.run.dir=DIR chooses the run directory. --cfg job prints the composed config, --hydra-help Hydra's flags."
    ]
    return "\n".join(lines).replace("$", "$$") + "\n"


def _help_of(owner: type[Any], name: str, prefix: str = "") -> list[str]:
    field = next(f for f in fields(owner) if f.name == name)
    default: Any = field.default_factory() if callable(field.default_factory) else field.default
    doc = " ".join(field_docs(owner)[name].split())
    if name == "backend":
        return [f"  backend: {doc}", *_help_of_backends()]
    if hasattr(default, "__dataclass_fields__"):
        inner = [line for f in fields(default) for line in _help_of(type(default), f.name, f"{prefix}{name}.")]
        return [f"  {prefix}{name}: {doc}", *inner, ""] if not prefix else inner
    shown = getattr(default, "value", default)
    shown = (
        {None: "null", True: "true", False: "false"}.get(shown, shown)
        if isinstance(shown, (bool, type(None)))
        else shown
    )
    first = f"    {prefix}{name} = {shown}" if shown != "???" else f"    {prefix}{name}"
    return [f"{first:<44} {doc}"] if len(first) < 44 else [first, f"{'':<44} {doc}"]


def _help_of_backends() -> list[str]:
    """Return the keys that all backends share, then those of each."""
    shared = {f.name: f.default for f in fields(BackendConfig)}
    lines = [line for name in shared for line in _help_of(BackendConfig, name, "backend.")] + [""]
    for backend, schema in BACKENDS.items():
        lines.append(f"  backend={backend.group}: {(schema.__doc__ or '').splitlines()[0]}")
        own = [f.name for f in fields(schema) if f.name not in shared or f.default != shared[f.name]]
        own = [name for name in own if name != "_target_"]
        lines += [line for name in own for line in _help_of(schema, name, "backend.")] + [""]
    return lines

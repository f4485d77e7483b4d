"""The command line: argv → verb → exit code. What goes wrong is said in one line.

Exit codes: 0 every row ok; 1 the run could not start, was refused, or was stopped by a fault or by errors, resumable; 3
finished, some rows are errors; 129, 130 and 143 interrupted by SIGHUP, SIGINT and SIGTERM, resumable.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from types import TracebackType

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from llmpipe.config.messages import in_words
from llmpipe.exceptions import LLMConfigError, LLMError, RunInterrupted
from llmpipe.redaction import redacted
from llmpipe.system.streams import lost, usable_streams
from llmpipe.verbs import OK, REFUSED, main_of
from llmpipe.verbs.arguments import chosen

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    with usable_streams():
        return command(list(sys.argv[1:] if argv is None else argv))


def command(arguments: list[str]) -> int:
    """Do what the arguments ask for and return the exit code."""
    try:
        Path.home()
    except RuntimeError:  # an unknown user; libraries would make a directory named ~
        os.environ["HOME"] = "/nonexistent"
    sys.excepthook = show_fault
    logging.raiseExceptions = False  # a log that cannot be written is no reason to fill the terminal
    try:
        verb, rest = chosen(arguments)
        code = main_of(verb)(rest)
    except SystemExit as end:  # a parser's, after --help or --version
        if end.code:
            raise
        code = None
    except RunInterrupted as error:
        return refused(error, 128 + error.signum)
    except (LLMError, HydraException, OmegaConfBaseException, OSError) as error:
        return refused(understood(error))
    except BrokenExecutor:
        return refused(LLMError("a process of the sweep has died; each job goes on with llmpipe resume ITS_DIRECTORY"))
    except KeyboardInterrupt as interrupt:
        signum = getattr(interrupt, "signum", signal.SIGINT)
        by = f"interrupted by {signal.Signals(signum).name}"
        return refused(LLMError(f"{by}; a run that had begun continues with llmpipe resume DIRECTORY"), 128 + signum)
    if code is None:  # it only printed
        return REFUSED if lost() else OK
    return code


def refused(error: Exception, code: int = REFUSED) -> int:
    """Say in a line what is wrong, and return the exit code."""
    print(f"llmpipe: {in_words(error)}", file=sys.stderr)
    return code


def understood(error: Exception) -> Exception:
    """Return an error, or the one behind what Hydra makes of it: it reads YAML, and writes before a job begins."""
    cause = error.__cause__
    if isinstance(cause, OSError) and not isinstance(error, LLMError):  # the log that cannot be opened
        error = cause
    if not isinstance(error, OSError) or isinstance(error, (LLMError, HydraException)):
        return error
    if error.filename is None and error.errno == errno.ENOENT:  # as `os.getcwd` says it
        return LLMError("the working directory is not there any more: change to one that is")
    if error.filename is None:  # Hydra's configuration, half written
        why = error.strerror if error.errno in FULL else None
        return LLMError(f"cannot write to the run directory: {why}; choose another hydra.run.dir") if why else error
    file = Path(os.fsdecode(error.filename))
    in_a_job = any(frame.name == "run_job" for frame in traceback.extract_tb(error.__traceback__))
    if file.suffix in (".yaml", ".yml") and file.name != "multirun.yaml" and not in_a_job:
        return LLMConfigError(f"cannot read a configuration: {file}: {error.strerror}")
    return LLMError(f"cannot write to the run directory: {file}: {error.strerror}; choose another hydra.run.dir")


def show_fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print what nobody expected as Python does, without what came from the environment."""
    print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)

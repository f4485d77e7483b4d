"""Everything that llmpipe raises on purpose.

    LLMError                        catch this one to catch them all
    ├── LLMConfigError              a value, option or name that cannot be honoured; also a ValueError
    ├── LLMInitializationError      a model or backend that could not be loaded
    │   └── MissingDependencyError  an optional package is not installed; also an ImportError
    ├── LLMInferenceError           the runner failed while generating, or was used wrongly
    │   └── LLMOutOfMemoryError     the device has too little memory for what is computed at once
    ├── DatasetError                a dataset that would fail every row, or was changed while it was read
    ├── LedgerError                 a run directory that is locked, damaged, or belongs to another run
    ├── RunInterrupted              a signal ended the run, which can be resumed
    └── RunStopped                  errors ended the run, as asked; it can be resumed

Each message is one readable line: what was got, what is allowed, what to do. A row that cannot be run is not an
exception: it becomes an error row, and its neighbours go on.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from llmpipe.quoting import how_to_resume, shortened
from llmpipe.redaction import redacted

MOST_CHARACTERS = 4000
"""Longest message; one that quotes more of the user's own text is cut in the middle."""


def one_line(error: BaseException) -> str:
    """Return what an error says, as one line; the name of its class where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())  # within one, a path may have blanks in a row
    return " ".join(filter(None, lines)) or type(error).__name__


def presentable(text: object) -> str:
    """Return what people may read of a text: nothing that came from the environment, and of a long one both ends."""
    return shortened(str(redacted(text)), MOST_CHARACTERS)


class LLMError(Exception):
    """Base of every error that llmpipe raises on purpose. No message has what came from the environment."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*map(presentable, args))


class LLMConfigError(LLMError, ValueError):
    """A configuration value is unknown, out of range, or cannot be honoured by the chosen backend."""


class LLMInitializationError(LLMError):
    """A model could not be found or loaded, or its device is not there."""


class MissingDependencyError(LLMInitializationError, ImportError):
    """An optional package is needed and not installed.

    Args:
        package: The package that failed to import, as its users call it.
        extra: The extra of llmpipe that brings it.
        why: What it is needed for.
    """

    def __init__(self, package: str, extra: str, why: str) -> None:
        super().__init__(f"{why} needs the package {package}: pip install 'llmpipe[{extra}]'")


class LLMInferenceError(LLMError):
    """The runner as a whole failed while generating, or is used in a way it cannot serve."""


class LLMOutOfMemoryError(LLMInferenceError):
    """The device has too little memory for what is to be computed at once."""


class DatasetError(LLMError, ValueError):
    """A dataset is missing, unreadable, lacks what every row needs, or was changed while it was read."""


class LedgerError(LLMError):
    """A run directory is in use, damaged, or was made by another configuration."""


class RunInterrupted(LLMError):
    """A signal ended the run; what was finished is in the ledger.

    Args:
        directory: The run directory, which can be resumed.
        signum: The signal.
    """

    def __init__(self, directory: Path, signum: int) -> None:
        self.directory, self.signum = directory, signum
        super().__init__(f"interrupted by {signal.Signals(signum).name}; continue with: {how_to_resume(directory)}")

    def __reduce__(self) -> tuple[type, tuple[Path, int]]:
        # The jobs of a sweep may run in other processes, from which it has to come here.
        return type(self), (self.directory, self.signum)


class RunStopped(LLMError):
    """Error rows ended the run, as `on_error` or `max_error_rate` asked; they and what was finished are in the ledger.

    Args:
        directory: The run directory, which can be resumed; rows that are errors stay errors.
        why: Which errors.
        overrides: With what to resume it, where it would stop again.
    """

    def __init__(self, directory: Path, why: str, *overrides: str) -> None:
        command = how_to_resume(directory, *overrides)
        super().__init__(f"{why}. Errors stay recorded; to go on with the rows after them: {command}")


class UnusableText(ValueError):
    """What a row says cannot be run, though nothing is wrong with the way its file has it."""

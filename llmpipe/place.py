"""A run directory, before anything is written there: what is opened in it must lie in it, and be llmpipe's.

The directory may come from somebody else, or others may write there too. Final files get their names from temporary
ones, so these need no look; what is written in place, as the ledger and the log are, would go wherever a link leads.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from llmpipe.config import RunConfig
from llmpipe.exceptions import LLMError
from llmpipe.ledger import FILE

IN_PLACE = (FILE, f"{FILE}-wal", f"{FILE}-shm", f"{FILE}-journal", ".lock")
INPUTS = ".input-*"
_KEYS = {"hydra", *(field.name for field in fields(RunConfig))}


def check_place(directory: Path, files: Iterable[Path] = (), within: Path | None = None) -> None:
    """Refuse links where a run would write; that the directory itself is reached through one does no harm.

    Args:
        directory: The run directory; it need not be there.
        files: What else is going to be written; those elsewhere are looked at too, but not the way to them.
        within: A directory, above the run's, from which on no link may lead on; by default the run directory.

    Raises:
        LLMError: names the link.
    """
    within = within or directory
    for file in (*(directory / name for name in IN_PLACE), *directory.glob(INPUTS), *files):
        for path in (*(above for above in reversed(file.parents) if within in above.parents), file):
            check_link(path)


def check_link(path: Path) -> None:
    """Refuse to write to what is a link, or neither a file nor a directory.

    Raises:
        LLMError: names it.
    """
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):  # whoever makes it will say what is wrong
        return
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise LLMError(f"cannot write to the run directory {path.parent}: {why}") from error
    if stat.S_ISLNK(status.st_mode):
        raise LLMError(f"{path} is a symlink (to {os.readlink(path)}), and a run would write there: remove it")
    if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        raise LLMError(f"{path} has other names too (hard links), and a run would write there: replace it by a copy")
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise LLMError(f"{path} is no regular file, and a run would write there: remove it")


def check_configs(file: Path) -> None:
    """Refuse to let Hydra write a composed config over that of another program.

    Raises:
        LLMError: names the file.
    """
    with suppress(OSError):  # not there, or whoever opens it will say what is wrong
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        # Of a beginning that was killed, any first part is there; its last line may end anywhere.
        if not all(line[:1] in ("", " ", "-") or line.partition(":")[0] in _KEYS for line in lines):
            raise LLMError(f"{file} is another program's, and would be written over: choose another directory")

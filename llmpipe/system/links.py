"""What is written in place must be there itself, and nowhere else: no link, and no file with other names."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from llmpipe.exceptions import LLMError


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

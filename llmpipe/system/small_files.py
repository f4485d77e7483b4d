"""Files that people write by hand, and that are held whole: whatever is far larger is something else."""

from __future__ import annotations

from pathlib import Path

MOST_MB = 16


def read_small_text(path: Path, encoding: str = "utf-8") -> str:
    """Return the text of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, or no text.
    """
    with path.open(encoding=encoding) as file:
        text = file.read(MOST_MB * 10**6 + 1)
    if len(text) > MOST_MB * 10**6:
        raise ValueError(f"the file is larger than {MOST_MB} MB")
    return text

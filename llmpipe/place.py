"""A run directory, before anything is written there: what is opened in it must lie in it, and be llmpipe's.

The directory may come from somebody else, or others may write there too. Final files get their names from temporary
ones, so these need no look; what is written in place, as the ledger and the log are, would go wherever a link leads.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llmpipe.ledger import FILE
from llmpipe.system.links import check_link

IN_PLACE = (FILE, f"{FILE}-wal", f"{FILE}-shm", f"{FILE}-journal", ".lock")
INPUTS = ".input-*"


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

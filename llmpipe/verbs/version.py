"""`llmpipe version`."""

from __future__ import annotations

from collections.abc import Sequence

from llmpipe.verbs.arguments import Parser
from llmpipe.version import __version__


def main(arguments: Sequence[str]) -> None:
    """Print the version."""
    Parser("version", "Prints the version.").read(arguments)
    print(f"llmpipe {__version__}")

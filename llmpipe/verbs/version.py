"""`llmpipe version`."""

from __future__ import annotations

from collections.abc import Sequence

from llmpipe import __version__
from llmpipe.verbs.arguments import Parser


def main(arguments: Sequence[str]) -> None:
    """Print the version."""
    Parser("version", "Prints the version.").read(arguments)
    print(f"llmpipe {__version__}")

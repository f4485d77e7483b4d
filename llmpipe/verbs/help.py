"""`llmpipe help [VERB]`: what there is to do, or what one verb does."""

from __future__ import annotations

from collections.abc import Sequence

from llmpipe.config.checks import reject_unknown
from llmpipe.help import help_text
from llmpipe.verbs import VERBS, main_of
from llmpipe.verbs.arguments import Parser


def main(arguments: Sequence[str]) -> None:
    """Print the help."""
    verbs = Parser("help", "Explains a verb, or every key.").read(arguments).words
    reject_unknown(verbs, VERBS, "verb")
    if verbs:
        main_of(verbs[0])(["--help"])
    else:
        print(help_text(), end="")

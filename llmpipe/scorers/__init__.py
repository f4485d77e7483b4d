"""Completions and what would be right → scores.

To add a scorer: a function of completion and reference, in a file of this folder, and its name in `SCORERS`.

matching.py   the texts, compared
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from llmpipe.cells import right_answers
from llmpipe.config import unknown_name
from llmpipe.exceptions import LLMConfigError
from llmpipe.records import Completion, Row
from llmpipe.scorers.matching import contains, exact_match

Scorer = Callable[[str, str], float]
"""Takes completion and reference; returns a score."""
Answered = TypeVar("Answered", bound=tuple[Row, Completion])

SCORERS: dict[str, Scorer] = {"exact_match": exact_match, "contains": contains}


def scorers_named(names: Sequence[str]) -> dict[str, Scorer]:
    """Return the named scorers.

    Raises:
        LLMConfigError: there is no such scorer.
    """
    for name in names:
        if name not in SCORERS:
            raise LLMConfigError(unknown_name(name, SCORERS, "scorer"))
    return {name: SCORERS[name] for name in names}


def scored(answered: Iterable[Answered], names: Sequence[str], reference: str) -> Iterator[Answered]:
    """Score each completion whose row has a reference.

    Args:
        answered: Rows and their completions.
        names: The scorers.
        reference: The column of the right answers.
    """
    chosen = scorers_named(names)
    for one in answered:
        row, completion = one
        right = right_answers(row.value(reference), row.typed)
        if right and completion.text is not None:
            completion.scores = {
                name: max(score(completion.text, text) for text in right) for name, score in chosen.items()
            }
        elif right:
            completion.scores = dict.fromkeys(chosen, 0.0)  # a row without an answer has no right one
        yield one

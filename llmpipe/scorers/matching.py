"""Whether a completion says what the reference says, as text."""

from __future__ import annotations


def exact_match(completion: str, reference: str) -> float:
    """1 where completion and reference are the same text, outer white space aside."""
    return float(completion.strip() == reference.strip())


def contains(completion: str, reference: str) -> float:
    """1 where the completion contains the reference."""
    return float(reference.strip() in completion)

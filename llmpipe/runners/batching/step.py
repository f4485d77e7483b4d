"""What one call of the model computes, and what is done with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from llmpipe.runners.batching.sequence import Sequence


class Cached(Protocol):
    """What has tokens in a slot's cache: a sequence, or a shared prefix."""

    cached: int


@dataclass
class Step:
    """One call; its tokens stand in the context's batch."""

    parts: list[tuple[Cached, int]]
    """The sequences or prefixes whose tokens the call computes, and how many of each; they are in its cache then."""
    outputs: list[Sequence]
    """Sequences that get their next token from the call, in the order in which they stand in the batch."""
    is_prefill: bool = True
    """Whether it computes tokens that were given, and not one that was generated for each sequence."""
    idle_slot: int | None = None
    """A slot that only keeps a sequence company, and is emptied afterwards."""

    @property
    def tokens(self) -> int:
        """How many tokens it computes."""
        return sum(count for _, count in self.parts)

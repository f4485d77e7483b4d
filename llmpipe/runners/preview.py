"""What is known of a model before its weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmpipe.runners.batching import Footprint, Sample, Sizes


@dataclass(frozen=True)
class Preview:
    """A model as its files describe it. The sizes are those that loading would choose, as far as that can be told."""

    model_type: str
    device: str
    context: int
    """Most tokens of prompt and completion that a row may have."""
    footprint: Footprint
    """Its mapped bytes are all the weights': memory that is free now, and will not be."""
    sizes: Callable[[Sequence[Sample]], Sizes]
    """Chooses the slots for samples that wait."""

"""The caller's side of a stream: what is to be called while it goes on. It goes in with the requests.

A backend need not know it. One that computes or waits for long without a chunk calls `self.tick()`; all else is for a
runner whose model is in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llmpipe.stopwatch import Tick, no_tick


@dataclass(frozen=True)
class Driver:
    """Whoever drives a stream; by default somebody who only takes what comes."""

    tick: Tick = no_tick
    """Called at each step: looks at the clock, at signals and for commits that failed; may raise to end the stream."""
    suspects: Mapping[int, int] = field(default_factory=dict)
    """How often each request was run alone that was in a process when that died, by its id; as noted earlier."""
    note_suspects: Callable[[dict[int, int]], None] = lambda suspects: None
    """Makes the suspects durable, before one of them is run again: it may take this process along."""
    reloaded: Callable[[], None] = lambda: None
    """Called when the model was loaded again, before it computes anything. What it raises ends the stream."""


NOBODY = Driver()

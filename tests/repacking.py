"""llama.cpp on a processor where what weights are laid out anew for does not work; for tests of the probe."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator

from llmpipe import Chunk, LlamaCppRunner, Request
from llmpipe.config import Switch


class BreakingWhenRepacked(LlamaCppRunner):
    """Crashes when it computes with weights that were laid out anew."""

    def stream(self, requests: Iterable[Request]) -> Iterator[Chunk]:
        if self.config.repack is Switch.on:
            ctypes.string_at(0)
        return super().stream(requests)

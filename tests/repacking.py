"""llama.cpp where something goes wrong, by a processor or by a file; for tests of the probe."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from llmpipe import Chunk, LlamaCppRunner, Request
from llmpipe.config import Switch


class BreakingWhenRepacked(LlamaCppRunner):
    """Crashes when it computes with weights that were laid out anew."""

    def stream(self, requests: Iterable[Request]) -> Iterator[Chunk]:
        if self.config.repack is Switch.on:
            ctypes.string_at(0)
        return super().stream(requests)


class Endless(LlamaCppRunner):
    """Loads for ever."""

    def _find_model(self) -> Path:
        time.sleep(600)
        return super()._find_model()


class Huge(LlamaCppRunner):
    """Takes the memory that there is."""

    def _find_model(self) -> Path:
        time.sleep(1)  # a file takes at least so long to fill it
        bytearray(5 * 2**30)
        return super()._find_model()

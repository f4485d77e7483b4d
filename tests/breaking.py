"""A runner that does to its process what the prompt says, as native code might; for tests of isolation."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llmpipe import BaseLLMRunner, Chunk, Request
from llmpipe.config import BackendConfig

DEEDS = {
    "segfault": lambda: ctypes.string_at(0),
    "abort": os.abort,
    "exit": lambda: os._exit(3),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "gorge": lambda: [bytearray(b"x" * 2**24) for _ in range(64)],
    "doze": lambda: time.sleep(0.3),
    "hang": lambda: time.sleep(600),
    "compute": lambda: hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1),  # and lets other threads work
    "stuck": lambda: ctypes.PyDLL(None).sleep(600),  # with Python's lock held, as some native code does
}


@dataclass
class BreakingConfig(BackendConfig):
    held: int = 8
    """Rows that it pulls before it answers any."""
    load: str = ""
    """What to do when loading."""
    pids: str = ""
    """A file that each process writes its id to."""


class Breaking(BaseLLMRunner):
    """Answers `held` rows side by side, word by word, and shouts."""

    config_type = BreakingConfig
    config: BreakingConfig

    def _initialize_model(self) -> None:
        if self.config.pids:
            with open(self.config.pids, "a") as file:
                file.write(f"{os.getpid()}\n")
        DEEDS.get(self.config.load, lambda: None)()

    def stream(self, requests: Iterable[Request]) -> Iterator[Chunk]:
        source, rows = iter(requests), []
        while True:
            while len(rows) < self.config.held and (request := next(source, None)) is not None:
                rows += [(request, sample, request.prompt.upper().split(" ")) for sample in request.samples]
            if not rows:
                return
            for row in list(rows):
                request, sample, words = row
                word = words.pop(0)
                DEEDS.get(word.lower(), lambda: None)()
                end = {} if words else {"finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 1}
                yield Chunk(request.id, sample, word + " " * bool(words), **end)
                if not words:
                    rows.remove(row)
            if self.config.load == "slow":
                time.sleep(0.01)

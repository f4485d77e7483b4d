"""The program of a child process: it loads a runner and answers what the parent asks; see child.py for the messages.

It leaves signals to the parent and ends with it: the socket closes, however the parent died.
"""

from __future__ import annotations

import ctypes
import logging
import os
import pickle
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import fields
from datetime import datetime
from multiprocessing.connection import Connection
from operator import attrgetter
from typing import Any

from llmpipe.chats import ChatInput
from llmpipe.records import Chunk, Request
from llmpipe.redaction import conceal
from llmpipe.runners.base import BaseLLMRunner
from llmpipe.runners.child import Message, named
from llmpipe.runners.driver import Driver
from llmpipe.runners.targets import import_class

log = logging.getLogger(__name__)

MOST_HANDED = 32
"""Most requests that wait in the child for its runner to pull them."""
CHUNKS_PER_MESSAGE = 512
LINGER_S = 0.002
"""How long a chunk waits for others, to travel with them."""
PR_SET_PDEATHSIG = 1

_values = attrgetter(*(f.name for f in fields(Chunk)))


class Abandoned(BaseException):
    """The parent has given up a stream. No `Exception`, because a backend may catch every `Exception` and go on."""


def serve(handle: int, parent: int) -> None:
    """Load a runner and answer what comes through the socket, until it closes."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    if parent and sys.platform == "linux":  # the socket would do, but for native code that never lets Python run
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)
    os.environ["GGML_NO_BACKTRACE"] = "1"  # else an abort calls for a debugger
    Service(Connection(handle)).run()


class Service:
    """The child's side of the conversation."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._blocks: queue.SimpleQueue[list[Request] | None] = queue.SimpleQueue()
        self._unanswered = 0
        """How many samples the runner has in flight."""
        self._outbox = Outbox(connection)
        self._abandoned = False
        self._runner: BaseLLMRunner | None = None
        threading.Thread(target=self._read, name="llmpipe-read", daemon=True).start()

    def run(self) -> None:
        """Answer the parent's messages, one after another, until the process ends."""
        while True:
            kind, content = self._inbox.get()
            answer: Callable[[Any], Message] = getattr(self, f"_{kind}")
            try:
                self._outbox.send(*answer(content))
            except Exception as error:  # the parent decides what it means
                log.debug("%s failed", kind, exc_info=True)
                self._outbox.send("failed", named(error))

    def _read(self) -> None:
        """Receive messages in a thread of their own, so that they arrive while the runner computes."""
        while True:
            try:
                kind, content = pickle.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                os._exit(0)  # the parent is gone
            except Exception as error:  # a class that cannot be imported here
                self._outbox.send("failed", named(error))
                continue
            if kind == "requests":
                self._blocks.put(content)
            elif kind == "abandon":
                self._abandoned = True
                self._blocks.put([])
                if self._runner is not None:
                    self._runner.interrupt()
            elif kind == "cancel":
                if self._runner is not None:  # it may just be loaded again
                    self._runner.cancel(content)
            else:
                self._inbox.put((kind, content))

    def _load(self, content: tuple[int, dict[str, str], str, tuple[Any, ...]]) -> Message:
        level, values, target, arguments = content
        for value, reference in values.items():  # here, too: a text that was cut would not be known any more
            conceal(value, reference)
        root = logging.getLogger()
        root.setLevel(level)
        root.addHandler(LogHandler(self._outbox))
        self._runner = import_class(target)(*arguments)
        return "loaded", self._status()

    def _stream(self, now: datetime) -> Message:
        assert self._runner is not None
        self._runner.now = now
        self._abandoned, self._blocks, self._unanswered = False, queue.SimpleQueue(), 0
        driver = Driver(self._tick)
        with suppress(Abandoned), closing(self._runner.driven(self._requests(), driver)) as chunks:
            for chunk in chunks:
                self._unanswered -= chunk.finish_reason is not None
                self._outbox.add(_values(chunk))
        return "ended", self._status()

    def _tick(self) -> None:
        if self._abandoned:
            raise Abandoned

    def _requests(self) -> Iterator[Request | None]:
        """Pull from the parent: one at first, then ever more at a time."""
        count = 1
        while True:
            self._outbox.send("pull", count)
            block = self._blocks.get()
            while block is None:  # the parent has none just now
                yield None
                with suppress(queue.Empty):
                    block = self._blocks.get(block=not self._unanswered)
            if not block or self._abandoned:
                return
            for request in block:
                self._unanswered += len(request.samples)
                yield request
            count = min(2 * count, MOST_HANDED)

    def _render(self, chat: ChatInput) -> Message:
        assert self._runner is not None
        return "rendered", self._runner._render(chat)

    def _tokenize(self, content: tuple[str, bool]) -> Message:
        assert self._runner is not None
        return "tokenized", self._runner.tokenize(*content)

    def _detokenize(self, ids: list[int]) -> Message:
        assert self._runner is not None
        return "detokenized", self._runner.detokenize(ids)

    def _status(self) -> dict[str, Any]:
        assert self._runner is not None
        return {
            "info": self._runner.info() if self._runner.is_loaded else {},
            "facts": self._runner.facts(),
            "chat_template": self._runner.chat_template,
            "joinable": self._runner.joinable,
            "device_memory_mb": self._runner._device_memory_mb(),
            "load_s": self._runner.load_s,
            "peak_rss_mb": _peak_rss_bytes() / 1e6,
        }


def _peak_rss_bytes() -> int:
    """Return the most memory this program has had; on Linux, `getrusage` would count what its parent had as well."""
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Outbox:
    """Sends messages in order; chunks wait a moment for others."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.RLock()
        self._waiting: list[tuple[Any, ...]] = []
        self._filled = threading.Event()
        threading.Thread(target=self._linger, name="llmpipe-send", daemon=True).start()

    def add(self, chunk: tuple[Any, ...]) -> None:
        """Send the values of a chunk, soon."""
        with self._lock:
            self._waiting.append(chunk)
            if len(self._waiting) >= CHUNKS_PER_MESSAGE:
                self._flush()
        if not self._filled.is_set():
            self._filled.set()

    def send(self, kind: str, content: Any) -> None:
        """Send a message at once, after the chunks that wait."""
        with self._lock:
            self._flush()
            self._write(kind, content)

    def _linger(self) -> None:
        while True:
            self._filled.wait()
            time.sleep(LINGER_S)
            self._filled.clear()
            with self._lock:
                self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._write("chunks", self._waiting)
            self._waiting = []

    def _write(self, kind: str, content: Any) -> None:
        try:
            self._connection.send_bytes(pickle.dumps((kind, content), pickle.HIGHEST_PROTOCOL))
        except OSError:
            os._exit(0)  # the parent is gone


class LogHandler(logging.Handler):
    """Sends what is logged to the parent's log."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__()
        self._outbox = outbox
        self.setFormatter(logging.Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        self._outbox.send("log", (record.name, record.levelno, self.format(record)))

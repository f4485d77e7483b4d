"""A runner in a process of its own: the program that runs there, and the parent's handle on it.

Messages are pairs of a kind and a content, pickled, over a socket. The parent sends `stream`, then `requests` for each
`pull` of the child, and gets `chunks`, many to a message, until `ended` or `failed`. The child leaves signals to the
parent and ends with it: the socket closes, however the parent died.

This guards against accidents. The child has the parent's rights, so it is no sandbox for hostile code.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from datetime import datetime
from multiprocessing.connection import Connection
from operator import attrgetter
from typing import Any

import psutil

from llmpipe.exceptions import (
    LLMConfigError,
    LLMError,
    LLMInferenceError,
    LLMInitializationError,
    LLMOutOfMemoryError,
)
from llmpipe.machine import oom_kills
from llmpipe.records import Chunk, Request
from llmpipe.redaction import conceal, concealed
from llmpipe.runners.base import BaseLLMRunner
from llmpipe.runners.chat import ChatTemplateError
from llmpipe.runners.targets import import_class

log = logging.getLogger(__name__)

MOST_HANDED = 32
"""Most requests that wait in the child for its runner to pull them."""
CHUNKS_PER_MESSAGE = 512
LINGER_S = 0.002
"""How long a chunk waits for others, to travel with them."""
PR_SET_PDEATHSIG = 1
FROM_OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
"""Signals that no fault of the code that runs is answered with."""

Message = tuple[str, Any]
_values = attrgetter(*(f.name for f in fields(Chunk)))
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from llmpipe.runners.child import serve; serve(int(sys.argv[2]), int(sys.argv[3]))"
)
_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (LLMConfigError, LLMInitializationError, LLMInferenceError, LLMOutOfMemoryError, ChatTemplateError)
}


class Abandoned(BaseException):
    """The parent wants no more of a stream. No `Exception`, because a backend may go on after any of those."""


class ChildDied(Exception):
    """The child is gone by what runs in it; the text says how, such as `crashed the backend (signal 11, SIGSEGV)`."""


class ChildHung(ChildDied):
    """It said nothing for so long that it was ended."""


class ChildStarved(ChildDied):
    """The system ended it, having no memory left."""


class ChildKilled(ChildDied):
    """Somebody outside ended it: what runs in it has no part in that."""


class Child:
    """The parent's handle: starts the process, talks to it, ends it.

    Args:
        target: Import path of the runner's class.
        *arguments: What it is made with.
    """

    def __init__(self, target: str, *arguments: Any) -> None:
        mine, its = socket.socketpair()
        # Linux ends the child with the thread that started it, which must then be the one that lives longest.
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        try:
            self._said = tempfile.TemporaryFile()
        except OSError:  # there is no place for one, and so for last words
            self._said = open(os.devnull, "w+b")
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), str(its.fileno()), str(parent)],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=self._said,
                start_new_session=True,  # the terminal's Ctrl-C goes to the parent alone
            )
        self._connection = Connection(mine.detach())
        self._owner = os.getpid()
        self._oom_kills = oom_kills()
        self._sending = threading.Lock()
        self.send("load", (logging.getLogger().getEffectiveLevel(), concealed(), target, arguments))

    @property
    def is_alive(self) -> bool:
        """Whether the process runs, and is there for this one."""
        return self.is_ours and self._process.poll() is None

    @property
    def is_ours(self) -> bool:
        """Whether this process started it, not one that this was forked from."""
        return self._owner == os.getpid()

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._process.pid

    @property
    def rss_bytes(self) -> int:
        """Resident memory of the process; 0 once it is gone."""
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss)
        except psutil.Error:
            return 0

    def send(self, kind: str, content: Any = None) -> None:
        """Send a message.

        Raises:
            ChildDied: nobody is there to read it.
        """
        data = pickle.dumps((kind, content), pickle.HIGHEST_PROTOCOL)
        try:
            with self._sending:
                self._connection.send_bytes(data)
        except OSError as error:
            raise self._death() from error

    def receive(self, timeout_s: float) -> Message | None:
        """Return the next message; None where there is none in time, or one for the log, which has it then.

        Raises:
            ChildDied: there will be no more.
        """
        try:
            if not self._connection.poll(timeout_s):
                return None
            message: Message = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._death() from error
        if message[0] != "log":
            return message
        name, level, text = message[1]
        logging.getLogger(name).log(level, "%s", text)
        return None

    def kill(self) -> None:
        """End the process at once, if it is ours. Does no harm when called again."""
        if self.is_ours:
            self._process.kill()
            self._process.wait()
        self._connection.close()
        self._said.close()

    def _death(self) -> ChildDied:
        """Clear away what is left, and say how the process ended."""
        code: int | None = None
        with suppress(subprocess.TimeoutExpired):  # it has closed its end and lives on
            code = self._process.wait(timeout=5)
        if not self._said.closed:
            self._said.seek(max(0, os.fstat(self._said.fileno()).st_size - 4096))
            log.debug("the backend's process said last: %a", self._said.read().decode("utf-8", "replace"))
        self.kill()
        if code is None:
            return ChildDied("cut the backend off")
        if code >= 0:
            return ChildDied(f"ended the backend's process (exit code {code})")
        name = next((known.name for known in signal.Signals if known == -code), "without a name")
        if name == "SIGKILL" and oom_kills() > self._oom_kills:
            return ChildStarved(f"ran the machine out of memory: the system ended the backend (signal {-code}, {name})")
        if name in FROM_OUTSIDE:
            return ChildKilled(f"was ended by a kill from outside (signal {-code}, {name})")
        return ChildDied(f"crashed the backend (signal {-code}, {name})")


def error_of(content: tuple[str, str]) -> Exception:
    """Return the exception that a `failed` message tells of."""
    name, text = content
    return _ERRORS[name](text)


# --- in the child -----------------------------------------------------------------------------------------------------


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
        self._blocks: queue.SimpleQueue[list[Request]] = queue.SimpleQueue()
        self._outbox = Outbox(connection)
        self._abandoned = False
        self._runner: BaseLLMRunner | None = None
        threading.Thread(target=self._read, name="llmpipe-read", daemon=True).start()

    def run(self) -> None:
        """Do what is asked for; ends with the process."""
        while True:
            kind, content = self._inbox.get()
            answer: Callable[[Any], Message] = getattr(self, f"_{kind}")
            try:
                self._outbox.send(*answer(content))
            except Exception as error:  # the parent decides what it means
                log.debug("%s failed", kind, exc_info=True)
                self._outbox.send("failed", _named(error))

    def _read(self) -> None:
        """Take messages as they come, whatever the runner is doing."""
        while True:
            try:
                kind, content = pickle.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                os._exit(0)  # the parent is gone
            except Exception as error:  # a class that cannot be imported here
                self._outbox.send("failed", _named(error))
                continue
            if kind == "requests":
                self._blocks.put(content)
            elif kind == "abandon":
                self._abandoned = True
                self._blocks.put([])
                getattr(self._runner, "interrupt", lambda: None)()
            elif kind == "cancel":
                getattr(self._runner, "cancel", lambda _: None)(content)
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
        self._abandoned, self._blocks = False, queue.SimpleQueue()
        chunks = self._runner._exclusively(self._runner.stream(self._requests()), self._tick)
        try:
            for chunk in chunks:
                self._outbox.add(_values(chunk))
                if not self._runner.ticks:
                    self._tick()
        except Abandoned:
            pass
        finally:
            chunks.close()
        return "ended", self._status()

    def _tick(self) -> None:
        if self._abandoned:
            raise Abandoned

    def _requests(self) -> Iterator[Request]:
        """Pull from the parent: one at first, then ever more at a time."""
        count = 1
        while True:
            self._outbox.send("pull", count)
            block = self._blocks.get()
            if not block or self._abandoned:
                return
            yield from block
            count = min(2 * count, MOST_HANDED)

    def _render(self, chat: tuple[Any, ...]) -> Message:
        assert self._runner is not None
        self._runner.now, *asked = chat
        return "rendered", self._runner.render(*asked)

    def _status(self) -> dict[str, Any]:
        assert self._runner is not None
        return {
            "info": self._runner.info() if self._runner.is_loaded else {},
            "facts": self._runner.facts(),
            "chat_template": self._runner.chat_template,
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


def _named(error: Exception) -> tuple[str, str]:
    """Return what the parent should raise: the nearest class that it knows, and the text."""
    name = next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _ERRORS), None)
    text = str(error) if isinstance(error, (LLMError, ChatTemplateError)) else f"{type(error).__name__}: {error}"
    return name or "LLMInferenceError", text

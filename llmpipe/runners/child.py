"""A process for a runner, as its parent sees it: started, talked to, ended, and asked how it died.

Messages are pairs of a kind and a content, pickled, over a socket. The parent sends `stream`, then `requests` for each
`pull` of the child (None where there are none just now, and later what there is), and gets `chunks`, many to a message,
until `ended` or `failed`. What answers them in the child is in service.py.

This guards against accidents. The child has the parent's rights, so it is no sandbox for hostile code.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import psutil

from llmpipe.exceptions import (
    LLMConfigError,
    LLMError,
    LLMInferenceError,
    LLMInitializationError,
    LLMOutOfMemoryError,
)
from llmpipe.redaction import concealed
from llmpipe.runners.chat import ChatTemplateError
from llmpipe.runners.deaths import ChildDied, death_of
from llmpipe.system.machine import oom_kills

log = logging.getLogger(__name__)

Message = tuple[str, Any]
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from llmpipe.runners.service import serve; serve(int(sys.argv[2]), int(sys.argv[3]))"
)
_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (LLMConfigError, LLMInitializationError, LLMInferenceError, LLMOutOfMemoryError, ChatTemplateError)
}


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
        try:
            self._send(kind, content)
        except OSError as error:
            raise self._death() from error

    def mention(self, kind: str, content: Any = None) -> None:
        """Send a message, from any thread, if somebody is there to read it."""
        with suppress(OSError):  # whoever waits for an answer will find out
            self._send(kind, content)

    def _send(self, kind: str, content: Any) -> None:
        data = pickle.dumps((kind, content), pickle.HIGHEST_PROTOCOL)
        with self._sending:
            self._connection.send_bytes(data)

    def receive(self, timeout_s: float) -> Message | None:
        """Return the next message; None where none comes in time, or where it was a log record, which is logged here.

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
        return death_of(code, starved=oom_kills() > self._oom_kills)


def error_of(content: tuple[str, str]) -> Exception:
    """Return the exception that a `failed` message tells of."""
    name, text = content
    return _ERRORS[name](text)


def named(error: Exception) -> tuple[str, str]:
    """Return what the parent should raise: the nearest class that it knows, and the text."""
    name = next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _ERRORS), None)
    text = str(error) if isinstance(error, (LLMError, ChatTemplateError)) else f"{type(error).__name__}: {error}"
    return name or "LLMInferenceError", text

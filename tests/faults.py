"""Faults at durable steps: where a run makes something last, it can be watched, killed, or told that the disk is full.

Steps are Python's, counted in `durable_steps`; calls are the system's, counted by what system_calls.c is compiled to.

Run as a program this is a server that forks a child for each run, so that hundreds of runs can be killed in a minute.
It imports what runs need and starts nothing itself.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import io
import itertools
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

Act = Callable[[int, str, bool], None]
"""Called with the number of a step, from 1, its kind, and whether it is done or about to be."""

COMPILER = [found] if (found := shutil.which("cc")) else []
SQLITE_CODES = {"ENOSPC": sqlite3.SQLITE_FULL, "EIO": sqlite3.SQLITE_IOERR, "EROFS": sqlite3.SQLITE_READONLY}


FAILING_CALLS = {"ENOSPC": "cnw", "EDQUOT": "cnw", "EIO": "connuws", "EMFILE": "co"}
"""The kinds of calls that fail so: (c)reate, (o)pen, (n)ame, (u)nlink, (w)rite, (s)ync."""


@contextmanager
def durable_steps(directory: Path, act: Act) -> Iterator[None]:
    """Call `act` before and after all that a run of llmpipe does to make something last in `directory`.

    The kinds are commit (and what else makes a ledger), open and write (of files made there), fsync and replace.
    """
    numbers = itertools.count(1)
    fsync, replace, open_, connect = os.fsync, os.replace, io.open, sqlite3.connect

    def step(kind: str, do: Callable[..., Any], *args: Any) -> Any:
        number = next(numbers)
        act(number, kind, False)
        result = do(*args)
        act(number, kind, True)
        return result

    class File(io.BufferedWriter):
        def write(self, data: Any) -> int:
            return int(step("write", super().write, data))

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            durable = sql.startswith(("COMMIT", "PRAGMA journal_mode=WAL"))
            return step("commit", super().execute, sql) if durable else super().execute(sql, *values)  # type: ignore[no-any-return]

    def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if "b" in mode and "r" not in mode and Path(str(file)).parent == directory:
            return step("open", lambda: File(io.FileIO(file, mode.replace("b", ""))))
        return open_(file, mode, *args, **options)

    with (
        patch("os.fsync", lambda handle: step("fsync", fsync, handle)),
        patch("os.replace", lambda old, new: step("replace", replace, old, new)),
        patch("io.open", opened),
        patch("sqlite3.connect", lambda *args, **options: connect(*args, **options, factory=Connection)),
    ):
        yield


def fault(name: str, kind: str) -> Exception:
    """Return what the system, or SQLite, raises where a disk is full, broken or read-only."""
    number = int(getattr(errno, name))
    if kind != "commit":
        return OSError(number, os.strerror(number))
    error = sqlite3.OperationalError(f"as if {name}")
    error.sqlite_errorcode = SQLITE_CODES[name]
    return error


# --- runs in children -------------------------------------------------------------------------------------------------


class Children:
    """The server's client: runs that end as one wishes.

    Args:
        count_calls: Whether system calls can be counted, and made to fail; needs a C compiler.
    """

    def __init__(self, count_calls: bool = False) -> None:
        command, environment = [sys.executable, __file__], dict(os.environ)
        self._made = tempfile.TemporaryDirectory()
        if count_calls:
            library = f"{self._made.name}/system_calls.so"
            source = str(Path(__file__).with_name("system_calls.c"))
            subprocess.run([*COMPILER, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
            environment["LD_PRELOAD"] = library
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._server = subprocess.Popen(command, env=environment, **pipes)  # type: ignore[call-overload]

    def run(self, directory: Path, *overrides: str, **job: Any) -> dict[str, Any]:
        """Run llmpipe in a child and return its exit code, what it said, and how many durable steps it took.

        Args:
            directory: The run directory.
            overrides: The configuration.
            job: `kill=(number, done)`: before or after which step to die; `kill_after_s`; `fault=(number, name)`: from
                which step on the disk is faulty, and how; `most_bytes` of a file; `rows_per_commit`; `resume=True`;
                `call=(number, name)`: the system call before which to die, or with a name from which on those of
                `FAILING_CALLS` fail. With `call` no steps are counted, but calls, and each is named. `library=True`
                runs without Hydra, which takes most of the time.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps({**job, "directory": str(directory), "overrides": overrides}) + "\n")
        self._server.stdin.flush()
        found: dict[str, Any] = json.loads(self._server.stdout.readline())
        return found

    def close(self) -> None:
        self._server.communicate()
        self._made.cleanup()


def serve() -> None:
    """Fork a child for each job on standard input, and answer with how it ended."""
    import llama_cpp  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    import llmpipe.cli
    import llmpipe.pipeline
    import llmpipe.runners  # noqa: F401
    import llmpipe.verbs.resume

    compose = functools.cache(lambda *overrides: llmpipe.compose(list(overrides)))
    for line in sys.stdin:
        job = json.loads(line)
        config = compose(*job["overrides"]) if job.get("library") else None
        said, taken = os.memfd_create("said"), os.memfd_create("taken")
        child = os.fork()
        if not child:
            os.dup2(said, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(run_child(job, taken, config))
        if job.get("kill_after_s") is not None:
            time.sleep(job["kill_after_s"])
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answer = {"exit": code, "said": os.pread(said, 2**20, 0).decode(), "steps": os.fstat(taken).st_size}
        if "call" in job:
            answer["calls"] = os.pread(taken, 2**20, 0).decode().splitlines()
        os.close(said), os.close(taken)
        print(json.dumps(answer), flush=True)


def run_child(job: dict[str, Any], taken: int, config: Any) -> int:
    """Run the command line, or a configuration, with what is to go wrong; each step taken leaves a byte in `taken`."""
    import llmpipe.ledger.writing
    from llmpipe.cli import main

    if "rows_per_commit" in job:
        llmpipe.ledger.writing.COMMIT_EVERY_ROWS, llmpipe.ledger.writing.COMMIT_EVERY_S = job["rows_per_commit"], 1e9
    if "most_bytes" in job:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["most_bytes"], resource.RLIM_INFINITY))

    def act(number: int, kind: str, done: bool) -> None:
        if not done:
            os.write(taken, b".")
        if "kill" in job and [number, done] == job["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if "fault" in job and number >= job["fault"][0] and not done:
            raise fault(job["fault"][1], kind)

    directory = Path(job["directory"])
    asked = ["resume", str(directory)] if job.get("resume") else [*job["overrides"], f"hydra.run.dir={directory}"]

    def run() -> int:
        if config is None:
            return main(asked)
        return 3 if llmpipe.run(config, directory, arguments=job["overrides"])["rows_error"] else 0

    if "call" in job:
        number, name = job["call"]
        code, kinds = (getattr(errno, name), FAILING_CALLS[name]) if name else (0, "")
        ctypes.CDLL(None).watch_calls(str(directory).encode(), taken, number, code, kinds.encode())
        return run()
    with durable_steps(directory, act):
        return run()


if __name__ == "__main__":
    serve()

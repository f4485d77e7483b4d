"""Whose turn it is with a runner: one call, or one open stream, at a time.

A stream has its turn from its first item to its last, over many calls, which may come from several threads, and the
turn must end whatever becomes of them. So a thread is known by an object that ends with it, for its number goes to
another one then, and a stream whose thread has ended is closed by whoever comes next.
"""

from __future__ import annotations

import gc
import inspect
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from llmpipe.exceptions import LLMInferenceError
from llmpipe.stopwatch import Tick, no_tick

log = logging.getLogger(__name__)

T = TypeVar("T")
LOOK_S = 0.5
"""How often those who wait look at what they wait for."""
IDLE_S = 1.0
"""How long nobody asks an open stream for more before it is idle: whoever closes the runner does not wait for that."""
LONG_S = 30.0
"""How long others wait for an idle stream before that is worth a warning."""
BUSY = "this runner is busy with a stream of this thread: exhaust or close that one first"
LEFT = "this stream was closed for another call, because the thread that it was in had ended; ask again"
CLOSED = "this stream was closed with its runner, by another thread: call reload() and ask again"
FORKED = "this runner was at work when this process was forked off: load another one here"
GOES_NOT_ON = "a stream cannot go on in a process that was forked off meanwhile: ask again there"


class Thread:
    """Stands for a thread for as long as that lives; for the main one, as long as the program does."""

    def __init__(self) -> None:
        self.is_main = threading.get_ident() == threading.main_thread().ident


_here = threading.local()


def this_thread() -> Thread:
    """Return what stands for the calling thread."""
    if not hasattr(_here, "thread"):
        _here.thread = Thread()
    thread: Thread = _here.thread
    return thread


def _forked() -> None:
    """Begin anew: no thread of the process that this one was forked from is here, whatever its objects say."""
    global _here
    _here = threading.local()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class Stream(Iterator[T]):
    """The items of a stream that has its turn. Closing or dropping it ends that, in whichever thread.

    Args:
        held: Yields the items while it has the turn; told of this stream.
    """

    def __init__(self, held: Callable[[weakref.ref[Stream[T]]], Generator[T]]) -> None:
        self._items = held(weakref.ref(self))
        self._step = threading.RLock()
        self._ended: str | None = None
        self.steps = 0
        """How many items were asked for."""

    def __next__(self) -> T:
        """Return the next item.

        Raises:
            LLMInferenceError: the stream was ended by another thread.
        """
        with self._step:
            if self._ended is not None:
                raise LLMInferenceError(self._ended)
            self.steps += 1
            return next(self._items)

    def close(self) -> None:
        """End the stream, after the item that is being made."""
        with self._step:
            self._items.close()

    @property
    def at_work(self) -> bool:
        """Whether an item is being made."""
        return inspect.getgeneratorstate(self._items) == inspect.GEN_RUNNING

    def end(self, why: str | None = None) -> bool:
        """End it unless it is at work just now, and say whether that was done; who goes on with it is told why."""
        if not self._step.acquire(blocking=False):
            return False
        try:
            if self.at_work:  # asked from inside itself, for instance by the iterator that it pulls requests from
                return False
            self._ended = why
            self._items.close()
            return True
        finally:
            self._step.release()


class Holder:
    """One that has a turn or waits for it: a stream, or, where no stream is set, a call."""

    def __init__(self) -> None:
        self._stream: weakref.ref[Stream[Any]] | None = None
        self._process = os.getpid()
        self._thread = weakref.ref(this_thread())

    def begin(self, stream: weakref.ref[Stream[Any]] | None) -> None:
        """Be this stream, or a call, of the calling thread."""
        self._stream, self._thread = stream, weakref.ref(this_thread())

    def go_on(self) -> None:
        """Note that the calling thread is the one that goes on.

        Raises:
            LLMInferenceError: it is in another process.
        """
        if self.is_elsewhere:
            raise LLMInferenceError(GOES_NOT_ON)
        self._thread = weakref.ref(this_thread())

    @property
    def is_elsewhere(self) -> bool:
        """Whether this is a copy of one in the process that this one was forked from."""
        return self._process != os.getpid()

    @property
    def is_gone(self) -> bool:
        """Whether its thread has ended."""
        thread = self._thread()
        return thread is None or (thread.is_main and not threading.main_thread().is_alive())

    @property
    def is_here(self) -> bool:
        """Whether its thread is the calling one."""
        return self._thread() is this_thread()

    @property
    def stream(self) -> Stream[Any] | None:
        """The stream, if it is one and still there."""
        return self._stream() if self._stream is not None else None


class Turns:
    """Lets one at a time have its turn, in the order in which they came.

    Who has it is known by a weak reference: whatever ends that one, also between two lines of this, its turn is over.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holder: weakref.ref[Holder] | None = None
        self._queue: deque[Holder] = deque()

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits."""
        return bool(self._queue)

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread has the turn."""
        holder = self._current()
        return holder is not None and holder.is_here

    def queue(self) -> Holder:
        """Take a place in the queue; it must come to a turn, or be left."""
        holder = Holder()
        self._queue.append(holder)
        return holder

    def leave(self, place: Holder) -> None:
        """Give up a place in the queue, if it is there."""
        with self._changed, suppress(ValueError):
            self._queue.remove(place)
            self._changed.notify_all()

    @contextmanager
    def turn(
        self,
        stream: weakref.ref[Stream[Any]] | None = None,
        ends: bool = False,
        tick: Tick = no_tick,
        place: Holder | None = None,
    ) -> Iterator[Holder]:
        """Wait for the turn and have it while the block lasts.

        Args:
            stream: What has it then; None for a call.
            ends: Close a stream that is idle instead of waiting for it.
            tick: Called now and then; what it raises ends the wait.
            place: One in the queue that was taken before.

        Raises:
            LLMInferenceError: the calling thread would wait for itself.
        """
        holder, wait = place or self.queue(), Wait(ends)
        holder.begin(stream)
        try:
            while not self._take(holder, wait.timeout_s):
                tick()
                wait.look_at(self._current())
        finally:
            self.leave(holder)
        try:
            yield holder
        finally:
            with self._changed:
                self._holder = None
                self._changed.notify_all()

    def _take(self, holder: Holder, timeout_s: float) -> bool:
        with self._changed:
            free = self._changed.wait_for(lambda: self._current() is None and self._first() is holder, timeout_s)
            if free:
                self._holder = weakref.ref(holder)
            return free

    def _first(self) -> Holder:
        """Return who has waited longest; a fork takes along those who wait, but not their threads."""
        return next(holder for holder in self._queue if not holder.is_elsewhere)

    def _current(self) -> Holder | None:
        return self._holder() if self._holder is not None else None


class Wait:
    """One wait for a turn, which knows what need not be waited for.

    Args:
        ends: As in `Turns.turn`.
    """

    def __init__(self, ends: bool) -> None:
        self._ends = ends
        self.timeout_s = 0.0
        """How long to wait before the next look."""
        self._collected = self._warned = False
        self._seen = 0, 0
        self._idle_since = time.monotonic()

    def look_at(self, holder: Holder | None) -> None:
        """End what `holder` will not end.

        Raises:
            LLMInferenceError: whoever waits for it waits for ever.
        """
        self.timeout_s = LOOK_S
        if holder is None:  # others came first
            return
        stream = holder.stream
        if holder.is_here:
            if (self._ends and stream is not None and stream.end()) or self._collect():
                return
            raise LLMInferenceError(BUSY)
        if holder.is_gone:
            if stream is not None and stream.end(LEFT):
                return
            if holder.is_elsewhere:
                raise LLMInferenceError(FORKED)
        elif stream is not None and (idle_s := self._idle_s(stream)) >= IDLE_S:
            if self._ends:
                stream.end(CLOSED)
            elif idle_s >= LONG_S and not self._warned:
                self._warned = True
                log.warning("waiting for a stream that another thread left open: exhaust or close it, or the runner")
            self._collect()

    def _idle_s(self, stream: Stream[Any]) -> float:
        """Return how long nobody has asked `stream` for more, as far as was seen."""
        seen = id(stream), stream.steps
        if seen != self._seen or stream.at_work:
            self._seen, self._idle_since = seen, time.monotonic()
        return time.monotonic() - self._idle_since

    def _collect(self) -> bool:
        """Close streams that nobody can reach any more, but for a cycle; say no where that was done before."""
        if self._collected:
            return False
        self._collected = True
        gc.collect()
        return True

"""Requests that come at any time, from any thread → one stream of a runner, in a thread of its own.

The thread lives while there is something to do. Its stream has its turn as any other: when somebody else waits for
one, no more requests join, those that were there before him go first, and the next stream comes after him. So the place
in that queue is taken by whoever brings the first request, not by the thread, which may be late.

Knows nothing of event loops: a call says by which function its chunks are handed over.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from typing import Protocol

from llmpipe.exceptions import LLMInferenceError
from llmpipe.records import Chunk, Request
from llmpipe.runners.driver import Driver
from llmpipe.runners.turns import BUSY, Holder, Stream, Turns

Give = Callable[[Chunk | BaseException], None]
"""Takes a request's chunks, and an error instead of more of them; called in the stepper's thread."""
NO_ANSWER = "the runner ended without an answer"


class Source(Protocol):
    """The part of a runner that the stepper needs."""

    joinable: bool
    """Whether `None` may be among the requests, for "none just now"."""

    def driven(self, requests: Iterator[Request | None], driver: Driver, place: Holder) -> Stream[Chunk]:
        """Open a stream that has its turn when `place` has, and is driven by `driver`, also while it waits."""

    def cancel(self, request_id: int) -> None:
        """Give up a request of the stream, where that can be done."""


class NobodyWaits(BaseException):
    """Nobody waits for an answer any more. No `Exception`, because a backend may catch every `Exception` and go on."""


class Call:
    """A request that somebody waits for, until he leaves."""

    def __init__(self, request: Request, give: Give) -> None:
        self.request = request
        self.give = give
        self.samples = set(request.samples)
        """Samples that have not ended."""
        self._left = False
        self._thread = threading.current_thread()

    def leave(self) -> None:
        """Wait no longer."""
        self._left = True

    @property
    def is_left(self) -> bool:
        """Whether nobody waits: he left, or his thread ends with the program, whose main thread has ended."""
        main = threading.main_thread()
        return self._left or ((self._thread is main or self._thread.daemon) and not main.is_alive())


class Stepper:
    """Feeds the calls of many to one stream at a time, and hands their chunks back.

    Args:
        turns: The runner's.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._process = os.getpid()
        self._ids = itertools.count()
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._waiting: deque[Call] = deque()
        self._open: dict[int, Call] = {}
        """Calls whose requests the stream has pulled, by id."""
        self._place: Holder | None = None
        """The next stream's place in the queue; None where the waiting calls need no next stream."""
        self._joins = False
        """Whether the current stream is sure to pull the waiting calls."""
        self._has_turn = False
        self._driver = Driver(self._tick)

    @property
    def is_elsewhere(self) -> bool:
        """Whether this is a copy of one in the process that this one was forked from."""
        return self._process != os.getpid()

    def submit(self, source: Source, request: Request, give: Give) -> Call:
        """Have a request answered.

        Raises:
            LLMInferenceError: the calling thread has a stream open, so that it would wait for itself; or there is no
                thread to be had.
        """
        if self._turns.is_mine:
            raise LLMInferenceError(BUSY)
        call = Call(replace(request, id=next(self._ids)), give)
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(target=self._run, args=(source,), name="llmpipe-step")
                try:
                    thread.start()
                except RuntimeError as error:
                    raise LLMInferenceError(f"no thread could be started for this request: {error}") from error
                self._thread = thread  # which waits for the lock
            self._waiting.append(call)
            self._take_place()
        return call

    def leave(self, source: Source, call: Call) -> None:
        """Give a call up: nobody waits for it any more. Does nothing where it has ended."""
        with self._lock:
            call.leave()
            with suppress(ValueError):
                self._waiting.remove(call)
            is_open = call.request.id in self._open
        if is_open:
            source.cancel(call.request.id)

    def end(self, error: BaseException) -> None:
        """End all calls, each with this error."""
        with self._lock:
            for call in (*self._open.values(), *self._waiting):
                self._give(call, error)
                call.leave()
            self._waiting.clear()

    def _take_place(self) -> None:
        self._waiting = deque(call for call in self._waiting if not call.is_left)
        if self._waiting and self._place is None and not self._joins:
            self._place = self._turns.queue()

    # --- in the thread --------------------------------------------------------------------------------------------

    def _run(self, source: Source) -> None:
        """Stream until nobody waits."""
        while True:
            with self._lock:
                place, self._place = self._place, None
                if place is None:
                    self._thread = None
                    return
                self._joins, self._has_turn = True, False
            try:
                with closing(source.driven(self._requests(source.joinable), self._driver, place)) as chunks:
                    for chunk in chunks:
                        self._take(source, chunk)
                for call in self._open.values():
                    self._give(call, LLMInferenceError(NO_ANSWER))
            except NobodyWaits:
                pass
            except BaseException as error:  # of the whole runner, so that those who wait would fare no better
                # What is no Exception, such as a panic of native code, would end the event loops of those who wait.
                self.end(error if isinstance(error, Exception) else LLMInferenceError(f"the backend raised {error!r}"))
            finally:
                self._turns.leave(place)
                with self._lock:
                    self._open.clear()
                    self._joins = False
                    self._take_place()

    def _requests(self, joinable: bool) -> Iterator[Request | None]:
        """Yield what waits, as long as the turn lasts."""
        self._has_turn = True
        most: int | None = None
        while True:
            with self._lock:
                if most is None and self._turns.is_wanted:
                    most, self._joins = len(self._waiting), False
                call = self._waiting.popleft() if self._waiting and most != 0 else None
                if call is not None:
                    self._open[call.request.id] = call
                elif most is not None or not (self._open and joinable):
                    self._joins = False
                    return
            if call is None:
                yield None
                continue
            most = None if most is None else most - 1
            yield call.request

    def _take(self, source: Source, chunk: Chunk) -> None:
        call = self._open.get(chunk.request_id)
        if call is None or chunk.sample not in call.samples:
            return
        if chunk.finish_reason is not None:
            call.samples.discard(chunk.sample)
            if not call.samples:
                with self._lock:
                    del self._open[chunk.request_id]
        if not call.is_left:
            self._give(call, chunk)
            if call.is_left:
                source.cancel(chunk.request_id)

    def _give(self, call: Call, what: Chunk | BaseException) -> None:
        if not call.is_left:
            try:
                call.give(what)
            except RuntimeError:  # its event loop is closed
                call.leave()

    def _tick(self) -> None:
        """End a stream, or the wait for its turn, that is for nobody."""
        with self._lock:
            in_vain = all(call.is_left for call in (self._open.values() if self._has_turn else self._waiting))
        if in_vain and (self._open or not self._has_turn):
            raise NobodyWaits

"""Requests that come at any time, from any thread → one stream of a runner, in a thread of its own.

The thread lives while there is something to do. Its stream has its turn as any other: when somebody else waits for
that, no more requests join, those that were there go first, and the next stream comes after him.

Knows nothing of event loops: a call says by which function its chunks are handed over.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace

from llmpipe.exceptions import LLMInferenceError
from llmpipe.records import Chunk, Request, Tick
from llmpipe.runners.turns import BUSY, Stream, Turns

Open = Callable[[Iterator[Request | None], Tick], Stream[Chunk]]
"""Opens a stream: requests, None among them for "none just now", and what is called at each step → chunks."""
NO_ANSWER = "the runner ended without an answer"


class NobodyWaits(BaseException):
    """All that is computed is for nobody. No `Exception`, because a backend may go on after any of those."""


@dataclass(eq=False)
class Call:
    """A request that somebody waits for, until he leaves.

    Attributes:
        request: What is asked, under an id that no other call has.
        give: Takes its chunks, and an error instead of more of them; called in the stepper's thread.
        cancel: Gives up the request of that id, where the runner can.
    """

    request: Request
    give: Callable[[Chunk | BaseException], None]
    cancel: Callable[[int], None]
    is_left: bool = False

    def __post_init__(self) -> None:
        self.samples = set(self.request.samples)
        """Those that have no end yet."""


class Stepper:
    """Feeds the calls of many to one stream at a time, and hands their chunks back.

    Args:
        turns: The runner's.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._ids = itertools.count()
        self._lock = threading.RLock()
        self._waiting: deque[Call] = deque()
        self._open: dict[int, Call] = {}
        """Those that the stream has pulled, by id."""
        self._has_turn = False
        self._thread: threading.Thread | None = None

    def submit(
        self,
        request: Request,
        give: Callable[[Chunk | BaseException], None],
        cancel: Callable[[int], None],
        open: Open,
    ) -> Call:
        """Have a request answered.

        Raises:
            LLMInferenceError: the calling thread has a stream open, so that it would wait for itself.
        """
        if self._turns.is_mine:
            raise LLMInferenceError(BUSY)
        call = Call(replace(request, id=next(self._ids)), give, cancel)
        with self._lock:
            self._waiting.append(call)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, args=(open,), name="llmpipe-step")
                self._thread.start()
        return call

    def leave(self, call: Call) -> None:
        """Give a call up: nobody waits for it any more. Does nothing where it has ended."""
        with self._lock:
            call.is_left = True
            with suppress(ValueError):
                self._waiting.remove(call)
            is_open = call.request.id in self._open
        if is_open:
            call.cancel(call.request.id)

    def end(self, error: BaseException) -> None:
        """End all calls, each with this error."""
        with self._lock:
            calls = [*self._open.values(), *self._waiting]
            self._waiting.clear()
            for call in calls:
                self._give(call, error)
                call.is_left = True

    # --- in the thread --------------------------------------------------------------------------------------------

    def _run(self, open: Open) -> None:
        """Stream until nobody waits."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
            self._has_turn = False
            try:
                with closing(open(self._requests(), self._tick)) as chunks:
                    for chunk in chunks:
                        self._take(chunk)
                        self._tick()
                for call in self._open.values():
                    self._give(call, LLMInferenceError(NO_ANSWER))
            except NobodyWaits:
                pass
            except Exception as error:  # of the whole runner, so that those who wait would fare no better
                self.end(error)
            with self._lock:
                self._open.clear()

    def _requests(self) -> Iterator[Request | None]:
        """Yield what waits, as long as the turn lasts."""
        self._has_turn = True
        left: int | None = None
        while left != 0:
            if left is None and self._turns.is_wanted:
                left = len(self._waiting)
            with self._lock:
                call = self._waiting.popleft() if self._waiting else None
                if call is not None:
                    self._open[call.request.id] = call
            if call is not None:
                left = None if left is None else left - 1
                yield call.request
            elif left is None and self._open:
                yield None
            else:
                return

    def _take(self, chunk: Chunk) -> None:
        call = self._open.get(chunk.request_id)
        if call is None:
            return
        if chunk.finish_reason is not None:
            call.samples.discard(chunk.sample)
            if not call.samples:
                with self._lock:
                    del self._open[chunk.request_id]
        self._give(call, chunk)

    def _give(self, call: Call, what: Chunk | BaseException) -> None:
        if call.is_left:
            return
        try:
            call.give(what)
        except RuntimeError:  # its event loop is closed
            self.leave(call)

    def _tick(self) -> None:
        if self._has_turn:
            in_vain = bool(self._open) and all(call.is_left for call in self._open.values())
        else:
            in_vain = not self._waiting
        if in_vain:
            raise NobodyWaits

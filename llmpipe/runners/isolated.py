"""A runner whose model lives in another process, where a row that crashes or hangs it costs that row alone.

When the child dies, or says nothing for `row_timeout_s`, it is started again, and the rows that it held are suspects:
they are run apart in groups, the groups that fail again in smaller ones, until the row that does it is alone. One that
does it `ALONE_ATTEMPTS` times alone, or hangs there, becomes an error row; the others finish. How often a suspect was
run alone is noted before each time, so that a row that takes the parent along is not tried for ever.

A kill from outside is no fault of a row's. Those that were in the child are run apart all the same, for they may have
asked for too much of the machine together; one that was alone is put off to the end. Each time that the child is lost
so, it is started again after a longer pause, until there is an answer, or the run ends, and can be resumed.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from math import isqrt
from typing import Any

from llmpipe.chats import parse_messages, parse_template_kwargs, parse_tools
from llmpipe.config import BackendConfig, DeviceConfig, DeviceType, ModelConfig, SamplingConfig
from llmpipe.exceptions import LLMConfigError, LLMInferenceError, LLMInitializationError
from llmpipe.records import Chunk, Message, Request, error_chunks
from llmpipe.runners.base import BaseLLMRunner
from llmpipe.runners.child import Child, ChildDied, ChildHung, ChildKilled, ChildStarved, error_of
from llmpipe.runners.facts import Facts

log = logging.getLogger(__name__)

TICK_S = 0.2
"""Seconds between two ticks while the child is waited for."""
LEAVE_S = 0.7
"""How long the child may take to give up a stream; then it is killed: with the tick before it, within a second."""
ALONE_ATTEMPTS = 3
"""How often a suspect is run alone, resumptions counted."""
LOSSES = 5
"""How often the child may be lost with no row to blame, and none answered meanwhile, before that ends the stream."""
PAUSE_S = 0.5
"""How long the child's next start waits after the first such loss; twice as long after each further one."""
NO_ROW = "something other than a row"


class IsolatedRunner(BaseLLMRunner):
    """Runs another runner in a child process, and looks like it.

    Args:
        target: Import path of the runner's class, which only the child needs.
        config_type: The dataclass of its options.
        config: As in `BaseLLMRunner`.
        device: As in `BaseLLMRunner`.
        sampling: As in `BaseLLMRunner`.
        weights: Without them, it is only seen whether the model's files can be read.
    """

    ticks = True
    _child: Child | None = None

    def __init__(
        self,
        target: str,
        config_type: type[BackendConfig],
        config: BackendConfig | ModelConfig | Mapping[str, Any],
        device: DeviceConfig | DeviceType | str | None = None,
        sampling: SamplingConfig | None = None,
        weights: bool = True,
    ) -> None:
        self.config_type = config_type  # type: ignore[misc]  # that of the runner inside
        self._target = target
        self._status: dict[str, Any] = {}
        self._restarts = 0
        self.crashes = 0
        """How often the child died of what ran in it."""
        self._lost, self._pause_s = 0, 0.0
        self.suspects: dict[int, int] = {}
        """Requests that were in a child when it died, in an earlier run, and how often each was then run alone."""
        self.note: Callable[[dict[int, int]], None] = lambda suspects: None
        """Makes the suspects durable."""
        self.reloaded: Callable[[], None] = lambda: None
        """Called when the model was loaded again, before it computes anything; what it raises ends the stream."""
        super().__init__(config, device, sampling, weights)

    def _initialize_model(self) -> None:
        self._start(weights=True)

    def _preview_model(self) -> None:
        self._start(weights=False)
        self._release_model()

    def _start(self, weights: bool) -> None:
        """Start a child and wait until the model is in it.

        Raises:
            LLMInitializationError: the child cannot load it, or died of it.
        """
        if os.name != "posix":
            raise LLMConfigError("backend.isolation=true needs Linux or macOS")
        no_weights = [] if weights else [False]  # a runner of someone else's may know of no such argument
        while True:
            self._pause()
            try:
                self._child = Child(self._target, self.config, self.device, self.sampling, *no_weights)
                while (message := self._child.receive(TICK_S)) is None:  # loading takes what it takes
                    self.tick()
                self._status = self._content(message)
                return
            except ChildDied as death:
                if not (self.is_loaded or isinstance(death, ChildKilled)):  # what was there before can be there again
                    raise LLMInitializationError(f"loading {self.config.model!r} {death}") from death
                log.warning("loading %r %s: trying again", self.config.model, death)
                self._lose(f"loading {self.config.model!r}", death)
            except BaseException:  # half loaded it is of no use
                self._release_model()
                raise

    def _lose(self, what: str, death: ChildDied) -> None:
        """Count a loss of the child that no row is to blame for.

        Raises:
            LLMInferenceError, LLMInitializationError: there are too many of them, with a model that was there or not.
        """
        self._lost += 1
        if self._lost == LOSSES:
            kind = LLMInferenceError if self.is_loaded else LLMInitializationError
            raise kind(f"{what} {death}, and the backend was lost {LOSSES} times in a row") from death
        self._pause_longer()

    def _pause_longer(self) -> None:
        """Let the next start wait, longer than the one before."""
        self._pause_s = min(2 * self._pause_s or PAUSE_S, PAUSE_S * 2**LOSSES)

    def _pause(self) -> None:
        until = time.monotonic() + self._pause_s
        while (left := until - time.monotonic()) > 0:
            self.tick()
            time.sleep(min(left, TICK_S))

    def _all_is_well(self) -> None:
        """Forget earlier losses."""
        self._lost, self._pause_s = 0, 0.0

    def _release_model(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _living_child(self) -> Child:
        """Return the child; a new one where it died.

        Raises:
            LLMInitializationError: the model, which was loaded before, cannot be loaded again.
        """
        if self._child is None or not self._child.is_alive:
            self._release_model()
            self._restarts += 1
            log.warning("the backend is started again")
            self._initialize_model()
            self.reloaded()
        assert self._child is not None
        return self._child

    @staticmethod
    def _content(message: tuple[str, Any]) -> Any:
        """Return what an answer holds; raise what a failure does."""
        kind, content = message
        if kind == "failed":
            raise error_of(content)
        return content

    # --- generating -----------------------------------------------------------------------------------------------

    def stream(self, requests: Iterable[Request]) -> Iterator[Chunk]:
        """Answer `requests`; see `BaseLLMRunner.stream`. A row that is run again says so, see `Chunk.restarts`."""
        self._check_loaded()
        self._all_is_well()
        suspects = dict(self.suspects)
        apart: deque[list[Request]] = deque()  # groups to be run now
        last: deque[list[Request]] = deque()  # single rows to be run when all others are done
        source = _unsuspected(requests, suspects, last)
        exhausted = False
        while apart or last or not exhausted:
            group = apart.popleft() if apart else last.popleft() if exhausted else None
            alone = group[0].id if group is not None and len(group) == 1 else None
            if group is not None and alone is not None and suspects[alone] >= ALONE_ATTEMPTS:
                yield from error_chunks(group[0], f"ended its run {ALONE_ATTEMPTS} times, without an answer")
                continue
            rows, held = source if group is None else iter(group), Held()
            child = self._living_child()
            self._count(alone, 1, suspects)
            try:
                yield from self._attempt(child, rows, held)
                exhausted = exhausted or group is None
            except ChildDied as death:
                yield from held.restarts()
                failed, left = held.unanswered(), [] if group is None else list(rows)
                log.warning("%s %s, with %d in flight", "a row" if failed else NO_ROW, death, len(failed))
                self.crashes += not isinstance(death, ChildKilled)
                innocent = not failed or isinstance(death, ChildKilled)
                if innocent:
                    self._lose("a row" if failed else NO_ROW, death)
                    self._count(alone, -1, suspects)
                elif alone is not None and (isinstance(death, ChildHung) or suspects[alone] >= ALONE_ATTEMPTS):
                    self._all_is_well()
                    yield from error_chunks(failed[0], str(death))
                    continue
                elif isinstance(death, ChildStarved):
                    self._pause_longer()
                suspects.update({row.id: suspects.get(row.id, 0) for row in failed})
                self.note(suspects)
                if innocent and failed and alone is not None:
                    last.append(failed)
                else:
                    size = max(isqrt(len(failed)), 1)  # few restarts, and neighbours still share the model
                    groups = [failed[i : i + size] for i in range(0, len(failed), size)]
                    apart.extendleft(reversed([*groups, left] if left else groups))
            except BaseException as end:
                if not isinstance(end, Exception):  # somebody ends the run: that has nothing to do with the row
                    self._count(alone, -1, suspects)
                raise
            finally:
                for answered in held.answered:
                    suspects.pop(answered, None)

    def _count(self, alone: int | None, by: int, suspects: dict[int, int]) -> None:
        """Count an attempt to run a suspect alone, or take that back, durably."""
        if alone is not None:
            suspects[alone] += by
            self.note(suspects)

    def _attempt(self, child: Child, requests: Iterator[Request], held: Held) -> Iterator[Chunk]:
        """Stream through the child, and keep account of what it holds.

        Raises:
            ChildDied: the child crashed, or hung and was killed.
        """
        ended = False
        try:
            child.send("stream", self.now)
            while not ended:
                kind, content = message = self._receive(child)
                if kind == "chunks":
                    for values in content:
                        chunk = Chunk(*values)
                        held.take(chunk)
                        if chunk.finish_reason is not None:
                            self._all_is_well()
                        yield chunk
                elif kind == "pull":
                    block = list(islice(requests, content))
                    held.give(block)
                    child.send("requests", block)
                else:
                    ended = True
                    self._status = self._content(message)
        except ChildDied:
            ended = True
            raise
        finally:
            if not ended:
                _leave(child)

    def _receive(self, child: Child) -> tuple[str, Any]:
        """Return the child's next message.

        Raises:
            ChildDied: it crashed, or said nothing for too long.
        """
        limit, since = self.config.row_timeout_s, time.monotonic()
        self.tick()
        while (message := child.receive(TICK_S)) is None:
            self.tick()
            if limit is not None and time.monotonic() - since > limit:
                child.kill()
                raise ChildHung(f"hung the backend for {limit:g} s")
        return message

    def cancel(self, request_id: int) -> None:
        """Give up a request of the running stream, where the runner inside can do that."""
        if self._child is not None:
            with suppress(ChildDied):  # the stream will find out
                self._child.send("cancel", request_id)

    # --- what the child says of itself ----------------------------------------------------------------------------

    @property
    def chat_template(self) -> str | None:
        """The chat template of the runner inside."""
        template: str | None = self._status.get("chat_template")
        return template

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final: bool = False,
    ) -> str:
        """Return the prompt text of a chat; see `BaseLLMRunner.render`."""
        self._check_loaded()
        chat = parse_messages(messages, any_role=True), parse_tools(tools)
        with self._turns.turn():
            self._all_is_well()
            while True:
                child = self._living_child()
                try:
                    child.send("render", (self.now, *chat, parse_template_kwargs(template_kwargs), continue_final))
                    return str(self._content(self._receive(child)))
                except ChildKilled as death:
                    self._lose("rendering a chat", death)
                except ChildDied as death:
                    raise LLMInferenceError(f"the chat template {death}") from death
                except BaseException as end:
                    if not isinstance(end, Exception):  # nobody waits for its answer, which the next one would get
                        self._release_model()
                    raise

    def info(self) -> dict[str, Any]:
        """Say what was loaded in the child, and what the child took."""
        own = {"restarts": self._restarts, **{name: self._status.get(name) for name in ("load_s", "peak_rss_mb")}}
        return {**self._status.get("info", {}), "isolation": own}

    def facts(self) -> Facts:
        """Say what decides the answers of the runner in the child; see `BaseLLMRunner.facts`."""
        return self._status.get("facts") or Facts()

    def rss_bytes(self) -> int:
        """Return the resident memory of both processes."""
        child = self._child  # which another thread may just replace
        return super().rss_bytes() + (child.rss_bytes if child is not None else 0)

    def _device_memory_mb(self) -> tuple[float, float] | None:
        return self._status.get("device_memory_mb")


class Held:
    """What is in the child: requests, which of their samples are open, and which of those have text that is out."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[Request, set[int]]] = {}
        self._begun: set[tuple[int, int]] = set()
        self.answered: list[int] = []
        """Ids of the requests that are done."""

    def give(self, requests: Iterable[Request]) -> None:
        """Note what goes to the child."""
        self._open.update({request.id: (request, set(request.samples)) for request in requests})

    def take(self, chunk: Chunk) -> None:
        """Note what comes back; what was not asked for is left to whoever counts answers."""
        key = chunk.request_id, chunk.sample
        if chunk.finish_reason is None:
            if chunk.text:
                self._begun.add(key)
            return
        self._begun.discard(key)
        if chunk.request_id in self._open:
            samples = self._open[chunk.request_id][1]
            samples.discard(chunk.sample)
            if not samples:
                del self._open[chunk.request_id]
                self.answered.append(chunk.request_id)

    def unanswered(self) -> list[Request]:
        """Return the requests for what is open."""
        return [replace(request, samples=tuple(sorted(samples))) for request, samples in self._open.values()]

    def restarts(self) -> Iterator[Chunk]:
        """Yield chunks that take back the text that is out."""
        for key in sorted(self._begun):
            yield Chunk(*key, restarts=True)


def _unsuspected(
    requests: Iterable[Request], suspects: Mapping[int, int], apart: deque[list[Request]]
) -> Iterator[Request]:
    """Yield `requests`, but put suspects of an earlier run apart, each alone."""
    for request in requests:
        if request.id in suspects:
            apart.append([request])
        else:
            yield request


def _leave(child: Child) -> None:
    """Make the child give up its stream; kill it if it does not. The stream of another process goes on."""
    if not child.is_ours:
        return
    deadline = time.monotonic() + LEAVE_S
    try:
        child.send("abandon")
        while (left := deadline - time.monotonic()) > 0:
            message = child.receive(left)
            if message is not None and message[0] in ("ended", "failed"):
                return
    except ChildDied:  # that ends a stream, too
        return
    child.kill()

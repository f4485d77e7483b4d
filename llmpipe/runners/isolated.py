"""A runner whose model lives in another process, where a row that crashes or hangs it costs that row alone.

child.py is the process, service.py the program that runs in it, and triage.py says which rows it is given when one of
them may have ended it. This starts it, again and again if need be, each time after a longer pause until there is an
answer, or the run ends, and can be resumed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llmpipe.chats import ChatInput
from llmpipe.config import BackendConfig, DeviceConfig, DeviceType, ModelConfig, SamplingConfig
from llmpipe.exceptions import LLMConfigError, LLMInferenceError, LLMInitializationError
from llmpipe.records import Chunk, Request
from llmpipe.runners.base import BaseLLMRunner
from llmpipe.runners.child import Child, error_of
from llmpipe.runners.deaths import ChildDied, ChildHung, ChildKilled
from llmpipe.runners.facts import Facts
from llmpipe.runners.triage import NO_ROW, Cohort, Losses, Triage
from llmpipe.stopwatch import Tick, no_tick

log = logging.getLogger(__name__)

TICK_S = 0.2
"""Seconds between two ticks while the child is waited for."""
LEAVE_S = 0.7
"""How long the child may take to give up a stream; then it is killed: with the tick before it, within a second."""


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
        """How often the child died by a fault of what ran in it, rather than by a kill from outside."""
        self._losses = Losses()
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
                self.joinable = self._status["joinable"]
                return
            except ChildDied as death:
                if not (self.is_loaded or isinstance(death, ChildKilled)):  # what was there before can be there again
                    raise LLMInitializationError(f"loading {self.config.model!r} {death}") from death
                log.warning("loading %r %s: trying again", self.config.model, death)
                error = LLMInferenceError if self.is_loaded else LLMInitializationError
                self._losses.add(f"loading {self.config.model!r}", death, error)
            except BaseException:  # half loaded it is of no use
                self._release_model()
                raise

    def _pause(self) -> None:
        until = time.monotonic() + self._losses.pause_s
        while (left := until - time.monotonic()) > 0:
            self.tick()
            time.sleep(min(left, TICK_S))

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
            self._driver.reloaded()
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

    def stream(self, requests: Iterable[Request | None]) -> Iterator[Chunk]:
        """Answer `requests`; see `BaseLLMRunner.stream`. A row that is run again says so, see `Chunk.restarts`."""
        self._check_loaded()
        self._losses.forget()
        triage = Triage(requests, self._driver.suspects, self._driver.note_suspects, self._losses)
        while (cohort := triage.next()) is not None:
            if given_up := triage.given_up(cohort):
                yield from given_up
                continue
            child = self._living_child()
            triage.begin(cohort)
            try:
                yield from self._run(child, cohort)
                triage.finish(cohort)
            except ChildDied as death:
                yield from cohort.restarts()
                held = cohort.held()
                log.warning("%s %s, with %d in flight", "a row" if held else NO_ROW, death, len(held))
                self.crashes += not isinstance(death, ChildKilled)
                yield from triage.blame(cohort, death)
            except BaseException as end:
                if not isinstance(end, Exception):  # somebody ends the run: that has nothing to do with the row
                    triage.withdraw(cohort)
                raise
            finally:
                triage.acquit(cohort)

    def _run(self, child: Child, cohort: Cohort) -> Iterator[Chunk]:
        """Stream through the child, and keep account of what it holds.

        Raises:
            ChildDied: the child crashed, or hung and was killed.
        """
        ended, asked = False, 0

        def hand_on() -> None:
            """Give the child the rows that it has asked for, once there are any."""
            nonlocal asked
            if asked and (rows := cohort.pull(asked)) is not None:
                child.send("requests", rows)
                asked = 0

        try:
            child.send("stream", self.now)
            while not ended:
                kind, content = message = self._receive(child, hand_on)
                if kind == "chunks":
                    for values in content:
                        chunk = Chunk(*values)
                        cohort.take(chunk)
                        if chunk.finish_reason is not None:
                            self._losses.forget()
                        yield chunk
                elif kind == "pull":
                    asked = content
                    hand_on()
                    if asked:
                        child.send("requests", None)
                else:
                    ended = True
                    self._status = self._content(message)
        except ChildDied:
            ended = True
            raise
        finally:
            if not ended:
                _leave(child)

    def _receive(self, child: Child, meanwhile: Tick = no_tick) -> tuple[str, Any]:
        """Return the child's next message, and do something `meanwhile`, now and then.

        Raises:
            ChildDied: it crashed, or said nothing for too long.
        """
        limit, since = self.config.row_timeout_s, time.monotonic()
        self.tick()
        meanwhile()
        while (message := child.receive(TICK_S)) is None:
            self.tick()
            meanwhile()
            if limit is not None and time.monotonic() - since > limit:
                child.kill()
                raise ChildHung(f"hung the backend for {limit:g} s")
        return message

    def cancel(self, request_id: int) -> None:
        """Give up a request of the running stream, where the runner inside can; see `BaseLLMRunner.cancel`."""
        child = self._child  # which the thread of the stream may just replace
        if child is not None:
            child.mention("cancel", request_id)

    # --- what the child says of itself ----------------------------------------------------------------------------

    @property
    def chat_template(self) -> str | None:
        """The chat template of the runner inside."""
        template: str | None = self._status.get("chat_template")
        return template

    def _render(self, chat: ChatInput) -> str:
        """Have the chat rendered in the child; see `BaseLLMRunner.render`."""
        return str(self._ask("render", chat, "the chat template"))

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Have a text tokenised in the child, when nothing else runs there; see `BaseLLMRunner.tokenize`."""
        return list(self._ask("tokenize", (text, special), "the tokenizer"))

    def detokenize(self, ids: Sequence[int]) -> str:
        """Have token ids made text in the child, when nothing else runs there; see `BaseLLMRunner.detokenize`."""
        return str(self._ask("detokenize", list(ids), "the tokenizer"))

    def _ask(self, kind: str, content: Any, what: str) -> Any:
        """Return what the child answers.

        Raises:
            LLMInferenceError: `what` has crashed or hung it.
        """
        self._check_loaded()
        with self._turns.turn():
            self._losses.forget()
            while True:
                child = self._living_child()
                try:
                    child.send(kind, content)
                    return self._content(self._receive(child))
                except ChildKilled as death:
                    self._losses.add(what, death)
                except ChildDied as death:
                    raise LLMInferenceError(f"{what} {death}") from death
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

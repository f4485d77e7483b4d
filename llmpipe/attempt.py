"""What one attempt at a run takes, on top of the attempts before it."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, Self

from llmpipe.config import RunConfig, is_own
from llmpipe.exceptions import LLMError, LLMInferenceError, LLMInitializationError, one_line
from llmpipe.ledger import Ledger
from llmpipe.quoting import how_to_resume
from llmpipe.redaction import as_written, below
from llmpipe.runners.base import BaseLLMRunner
from llmpipe.runners.digests import ModelChanged
from llmpipe.stopping import WaitingIsOver
from llmpipe.system.memory import MemorySampler

log = logging.getLogger(__name__)


def utc_now() -> str:
    """Return date and time, to the second, as ISO 8601 has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Attempt:
    """Notes in the ledger what this attempt takes, on top of the attempts before it, and how its runner failed.

    Raises:
        LLMInferenceError: the runner failed inside of the `with` block; says what is safe.
    """

    def __init__(
        self, ledger: Ledger, runner: BaseLLMRunner, memory: MemorySampler, config: RunConfig, prompt_format: str
    ) -> None:
        self._ledger, self._runner, self._memory, self._config = ledger, runner, memory, config
        self._before = {name: ledger.get(name) or 0.0 for name in ("wall_s", "peak_rss_mb", "peak_device_mb")}
        started_at, offset_s = ledger.get("started_at") or utc_now(), ledger.get("utc_offset_s")
        started = datetime.fromisoformat(started_at)
        if offset_s is None:
            offset_s = time.localtime(started.timestamp()).tm_gmtoff
        runner.now = started.astimezone(timezone(timedelta(seconds=offset_s)))  # by the clocks where the run began
        facts = {"started_at": started_at, "utc_offset_s": offset_s}
        ledger.set(load_s=runner.load_s, prompt_format=prompt_format, **facts)
        self._started = time.perf_counter()
        ledger.alongside = self._figures  # so that an attempt that is killed counts too

    def _figures(self) -> dict[str, Any]:
        return {
            "wall_s": self._before["wall_s"] + time.perf_counter() - self._started,
            "peak_rss_mb": max(self._before["peak_rss_mb"], self._memory.peak_rss_mb),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        """Commit what was finished; where the runner failed, say what is safe.

        Returns:
            Whether the attempt was ended on purpose: `Stops` knows why.
        """
        self._ledger.commit()
        self._note_end()
        if isinstance(error, Exception):
            self._explain(error)
        return isinstance(error, WaitingIsOver)

    def _note_end(self) -> None:
        device = self._runner.memory_usage()["peak_device_mb"] or 0.0
        peak = max(self._before["peak_device_mb"], device) or None
        did = self._ledger.noted or self._ledger.get("runner") is None  # else another attempt's figures say more
        info = as_written(self._runner.info(), below(self._config.references, "backend"))
        self._ledger.set(peak_device_mb=peak, **({"runner": info} if did else {}), **self._figures())

    def _explain(self, error: Exception) -> None:
        """Turn a fault of the runner into an error of the run; an error that is not the runner's goes on as it is."""
        name = type(self._runner).__name__
        safe = f"what was finished is safe: {how_to_resume(self._ledger.directory)}"
        if isinstance(error, (LLMInferenceError, LLMInitializationError)) and not isinstance(error, ModelChanged):
            # A model that could not be loaded was loaded again, in the middle: the run had begun.
            raise LLMInferenceError(f"{error}; {safe}") from error
        if not isinstance(error, LLMError) and not is_own(type(self._runner).__module__):
            log.error("%s failed", name, exc_info=error)  # its author wants to see where
            raise LLMInferenceError(f"{name} failed: {one_line(error)}; {safe}") from error

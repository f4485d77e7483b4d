"""What one attempt at a run takes, on top of the attempts before it."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from llmpipe.config import RunConfig
from llmpipe.ledger import Ledger
from llmpipe.memory import MemorySampler
from llmpipe.redaction import as_written, below
from llmpipe.runners.base import BaseLLMRunner


def utc_now() -> str:
    """Return date and time, to the second, as ISO 8601 has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Attempt:
    """Notes in the ledger what this attempt takes, on top of the attempts before it."""

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

    def ended(self) -> None:
        """Note what is known at its end: the device's memory, and what the runner says of itself."""
        device = self._runner.memory_usage()["peak_device_mb"] or 0.0
        peak = max(self._before["peak_device_mb"], device) or None
        did = self._ledger.noted or self._ledger.get("runner") is None  # else another attempt's figures say more
        info = as_written(self._runner.info(), below(self._config.references, "backend"))
        runner = {"runner": info} if did else {}
        self._ledger.set(peak_device_mb=peak, **runner, **self._figures())

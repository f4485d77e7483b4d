"""What a run would do and take, before any weights are loaded.

Every check of a real run is made, in its order and with its words; every row is read and becomes a request. Memory does
not grow with the dataset: of a long one, tokens are counted in every k-th row only, and the plan says so. A directory
that holds a run is left as it is.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmpipe.config import RunConfig, is_own
from llmpipe.datasets import Inputs, Scan
from llmpipe.exceptions import LLMError, LLMInitializationError, one_line
from llmpipe.failures import Failures
from llmpipe.fingerprint import compare_facts, facts_of, fingerprint
from llmpipe.first_rows import refuse_hopeless
from llmpipe.histogram import bars
from llmpipe.ledger import LedgerSnapshot
from llmpipe.metrics import percentiles
from llmpipe.outputs import found_files, json_text, output_files, own_file, refuse_foreign
from llmpipe.place import check_place
from llmpipe.preflight import look_through, mention_unread, runs_chats
from llmpipe.prompts import PromptBuilder, settle_prompt
from llmpipe.records import Request, Row
from llmpipe.redaction import as_written, below, redacted
from llmpipe.resumption import Before
from llmpipe.runners.base import BaseLLMRunner
from llmpipe.runners.batching.lookahead import LookAhead
from llmpipe.runners.factory import LLMRunnerFactory
from llmpipe.text import harmless

PLAN_FILE = "plan.json"
MOST_COUNTED = 100_000
"""Rows whose tokens are counted."""
FEW = 5
"""Bad rows and longest rows that are named."""
SHOWN, SHOWN_CHARACTERS = 3, 1000
"""Prompts that are shown, and how much of them."""
BINS = 12
SIZED_BY = 256
"""First samples of the dataset that the sizes are chosen from, besides the longest ones."""


def plan(config: RunConfig, directory: str | Path) -> dict[str, Any]:
    """Say what a run would do and take.

    Args:
        config: The run; see `llmpipe.compose`.
        directory: Its run directory. `plan.json` is written there, unless it holds a run already.

    Returns:
        The content of `plan.json`.

    Raises:
        LLMConfigError, DatasetError, LLMInitializationError, LedgerError: the run could not start.
        LLMError: there is a `plan.json` that llmpipe did not write.
    """
    directory = Path(directory)
    config = config.replace({"prompt": settle_prompt(config.prompt)})
    check_place(directory)
    before = Before.of(directory)
    if not before.begun:
        refuse_foreign(directory / PLAN_FILE, {})
    with Inputs(directory if before.begun else None, before.begun) as inputs:
        found: dict[str, Any] = redacted(_planned(config, directory, inputs, before))
    if not before.begun:
        write_plan(directory, found)
    return found


def _planned(config: RunConfig, directory: Path, inputs: Inputs, before: Before) -> dict[str, Any]:
    dataset, scan, _ = look_through(config, inputs, before)
    done, known = so_far(config, scan, directory, before)
    if done is None:
        refuse_hopeless(config, dataset, scan)
    with LLMRunnerFactory.from_target(config.backend, config.device, config.trusted_modules, weights=False) as runner:
        try:
            compare_facts(known, facts_of(runner), runner.config.reproducible, directory)
            chat = runs_chats(config, scan, runner)
            mention_unread(config, scan, chat)
            prompts = PromptBuilder(config.prompt, config.dataset.columns, config.sampling, config.seed, chat)
            survey = Survey(runner, prompts, config.dataset.columns.id, every=-(-scan.rows // MOST_COUNTED) or 1)
            for row in dataset.rows():
                survey.add(row)
            takes = what_it_takes(runner, survey)
            takes["model"] = as_written(takes["model"], below(config.references, "backend"))
            found = {
                "rows": scan.rows,
                "rows_done": done,
                **survey.figures(),
                "samples_per_row": config.sampling.n,
                "columns": scan.columns,
                "dataset_digest": scan.digest,
                "prompt_format": "chat" if chat else "raw",
                **takes,
            }
        except LLMError:
            raise
        except Exception as error:
            if runner.preview is not None or is_own(type(runner).__module__):
                raise
            why = one_line(error)
            raise LLMInitializationError(
                f"{type(runner).__name__} cannot be planned for: without its weights it fails ({why}); "
                f"it can have a method _preview_model"
            ) from error
    return found


def so_far(config: RunConfig, scan: Scan, directory: Path, before: Before) -> tuple[int | None, dict[str, Any]]:
    """Return how many rows of the run in a directory are done, and the facts of the runner that it began with.

    The number is None where no run has begun. Facts are missing where no model was loaded yet, or none is needed.

    Raises:
        LedgerError: a run with this configuration could not go on, or begin, there.
    """
    if not before.begun:
        found_files(directory, output_files(config.output), {})
        return None, {}
    asked = before.continued(fingerprint(config, scan, before.fingerprint), scan)
    with LedgerSnapshot(directory, asked, before.change(scan, config.dataset)) as ledger:
        found_files(directory, output_files(config.output), ledger.get("files") or {})
        return ledger.rows(), {} if ledger.finished() else ledger.get("facts") or {}


class Survey:
    """What one pass over the rows finds.

    Args:
        runner: Encodes requests; its weights are not needed.
        prompts: Turns rows into requests.
        id_column: Where the rows' names are.
        every: Tokens are counted in every row whose number this divides.
    """

    def __init__(self, runner: BaseLLMRunner, prompts: PromptBuilder, id_column: str | None, every: int) -> None:
        self._runner, self._prompts, self._id_column, self._every = runner, prompts, id_column, every
        self._errors: list[dict[str, Any]] = []
        self._failures = Failures()
        self._rows = self._bad_rows = self._unnamed = self._over_context = 0
        self._tokens = array("q")
        self._longest: list[tuple[int, int, dict[str, Any]]] = []
        self._first: list[Request] = []
        self._largest: Request | None = None
        self._need = 0
        self._shown: list[dict[str, Any]] = []

    def add(self, row: Row) -> None:
        """Look at one row."""
        self._rows += 1
        self._unnamed += row.own_id(self._id_column) is None
        try:
            request = self._prompts.build(row)
            assert request is not None  # no sample is done, so there is something to ask
            if row.index % self._every == 0:
                self._encode(row, request)
            if len(self._shown) < SHOWN:
                text = harmless(redacted(self._runner.prompt_text(request)))
                self._shown.append({**self._name(row), "text": text[:SHOWN_CHARACTERS], "characters": len(text)})
        except (ValueError, RecursionError) as error:
            self._bad_rows += 1
            self._failures.add(row.index, row.file, row.line, harmless(str(error)))
            if len(self._errors) < FEW:
                self._errors.append({**self._name(row), "reason": harmless(str(error))})

    def _encode(self, row: Row, request: Request) -> None:
        """Count the prompt's tokens, also where they are too many for the row to be run."""
        encoded = self._runner.encode(replace(request, truncate=True))
        if encoded is None:
            return
        kept, cut = encoded
        tokens = len(kept) + cut
        self._tokens.append(tokens)
        named = {**self._name(row), "prompt_tokens": tokens, "max_tokens": request.sampling.max_tokens}
        need = tokens + request.sampling.max_tokens
        entry = (need, -row.index, named)
        (heapq.heappush if len(self._longest) < FEW else heapq.heappushpop)(self._longest, entry)
        if cut:
            self._over_context += 1
            self._runner.encode(request)  # which raises, unless prompts are to be truncated
        if need > self._need:
            self._need, self._largest = need, request
        if len(self._first) < SIZED_BY:
            self._first.append(request)

    def _name(self, row: Row) -> dict[str, Any]:
        return {"file": harmless(row.file), "line": row.line, "id": harmless(str(row.id(self._id_column)))}

    def figures(self) -> dict[str, Any]:
        """Return what was found."""
        counts = self._tokens
        longest = sorted(self._longest, reverse=True)
        return {
            "rows_ok": self._rows - self._bad_rows,
            "rows_error": self._bad_rows,
            "errors": self._errors,
            "error_reasons": self._failures.most_frequent(),
            "rows_without_id": self._unnamed,
            "duplicate_ids": 0,  # with one, the run would have been refused
            "counted_rows": len(counts),
            "counted_every": self._every,
            "prompt_tokens": {"total": sum(counts), **percentiles(counts)} if counts else None,
            "prompt_tokens_histogram": histogram(counts),
            "rows_over_context": self._over_context if counts else None,
            "longest": [named for *_, named in longest],
            "prompts": self._shown,
        }

    def deciding(self) -> Iterable[Request]:
        """Return the requests that decide the sizes: the longest, then the first ones."""
        largest = [] if self._largest is None else [self._largest]
        return {request.id: request for request in [*largest, *self._first]}.values()


def histogram(counts: Sequence[int]) -> list[dict[str, int]]:
    """Return how many of the counts are `from` so many `to` so many, both included, in bins of equal width."""
    if not counts:
        return []
    low, high = min(counts), max(counts)
    width = (high - low) // BINS + 1
    edges = range(low, high + width + 1, width)
    return [{"from": int(bar.start), "to": int(bar.end) - 1, "rows": bar.size} for bar in bars(counts, edges)]


def what_it_takes(runner: BaseLLMRunner, survey: Survey) -> dict[str, Any]:
    """Return the slots that would be chosen, and the memory for them and for the weights, in MB; nulls if unknown."""
    preview = runner.preview
    model: dict[str, Any] = {"model": runner.config.model}
    if preview is None:
        return {"model": model, "sizes": None, "memory_mb": None}
    footprint = preview.footprint
    model |= {"model_type": preview.model_type, "device": preview.device, "context": preview.context}
    model |= {"parameters": footprint.parameters}
    ahead = LookAhead(survey.deciding(), runner.encode, preview.context, share=not runner.config.reproducible)  # type: ignore[arg-type]
    while ahead.fill(SIZED_BY):
        pass  # bad rows are counted elsewhere
    if not ahead.waiting:
        return {"model": model, "sizes": None, "memory_mb": None}
    chosen = preview.sizes(ahead.waiting)
    sizes = {"slots": chosen.slots, "prefix_slots": chosen.prefixes, "slot_tokens": chosen.context}
    known = footprint.cache_bytes_per_token > 0
    cache = (chosen.slots + chosen.prefixes) * footprint.slot_bytes(chosen.context) if known else None
    memory = {"weights": footprint.mapped_bytes / 1e6, "cache": None if cache is None else cache / 1e6}
    memory["total"] = None if cache is None else (footprint.mapped_bytes + cache) / 1e6
    return {"model": model, "sizes": {**sizes, "reasons": list(chosen.reasons)}, "memory_mb": memory}


def write_plan(directory: Path, found: dict[str, Any]) -> None:
    """Write `plan.json`, whole or not at all.

    Raises:
        LLMError: the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LLMError(f"cannot write to the run directory {directory}: {error.strerror or error}") from error
    with own_file(directory / PLAN_FILE, {}) as file:
        file.write(json_text(found))

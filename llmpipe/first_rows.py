"""What would fail on every one of the first rows, or of all, is refused before a model loads.

A row whose own text cannot be run (it is empty, say) is an error row all the same: nothing is wrong with the file then.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from llmpipe.config import RunConfig, is_own
from llmpipe.datasets import Dataset, Scan
from llmpipe.exceptions import DatasetError, UnusableText
from llmpipe.fingerprint import backend_values
from llmpipe.preflight import runs_chats
from llmpipe.prompts import PromptBuilder
from llmpipe.records import Request, Row
from llmpipe.runners.base import BaseLLMRunner
from llmpipe.runners.factory import LLMRunnerFactory

FIRST_ROWS = 128


def refuse_hopeless(config: RunConfig, dataset: Dataset, scan: Scan) -> None:
    """Refuse a run whose first rows all fail, by themselves or in the model's chat template.

    Args:
        config: The run.
        dataset: Its rows.
        scan: What is in them.

    Raises:
        DatasetError: all of them fail; gives the reason for the first one.
        LLMConfigError, LLMInitializationError: the model's files cannot be read, or do not suit the prompts.
    """
    builder = PromptBuilder(config.prompt, config.dataset.columns, config.sampling, config.seed, chat=True)
    requests: list[Request | None] = []

    def build(row: Row) -> None:
        requests.append(builder.build(row))

    _refuse(dataset, build)
    # Every template takes a single question, so the model's vocabulary is read only for chats of more turns.
    chats = [request.messages for request in requests if request is not None and request.messages is not None]
    if not _is_own_and_here(config) or all([message["role"] for message in chat] == ["user"] for chat in chats):
        return
    with LLMRunnerFactory.from_target(config.backend, config.device, weights=False) as runner:
        runner.renderer.silent = True
        chat = runs_chats(config, scan, runner)
        prompts = PromptBuilder(config.prompt, config.dataset.columns, config.sampling, config.seed, chat)
        _refuse(dataset, lambda row: _render(runner, prompts.build(row)))


def _render(runner: BaseLLMRunner, request: Request | None) -> None:
    if request is not None:
        runner.prompt_text(request)


def _is_own_and_here(config: RunConfig) -> bool:
    """Say whether the backend is one of llmpipe's, and is to run in this process."""
    values = backend_values(config)
    return is_own(values.get("_target_")) and not values.get("isolation")


def _refuse(dataset: Dataset, attempt: Callable[[Row], None]) -> None:
    failed: list[str] = []
    for row in islice(dataset.rows(), FIRST_ROWS):  # read anew: to hold them would be to hold so many large rows
        try:
            attempt(row)
            return
        except UnusableText:
            return
        except (ValueError, RecursionError) as error:
            failed.append(f"{row.file} line {row.line}: {error}")
    if failed:
        which = "the only row fails" if len(failed) == 1 else f"every one of the first {len(failed)} rows fails"
        raise DatasetError(f"{which}, so that nothing was begun: {failed[0]}")

"""What is refused, or mentioned, before a model's weights are loaded: what options and files say of themselves."""

from __future__ import annotations

import logging
from typing import NamedTuple

from llmpipe.config import PromptFormat, RunConfig, check_trusted
from llmpipe.datasets import Dataset, Inputs, Scan
from llmpipe.exceptions import LLMConfigError
from llmpipe.fingerprint import backend_values
from llmpipe.outputs import ColumnTypes, all_names, column_types, layout_of
from llmpipe.prompts import OTHER_NAMES, template_columns, unread_columns
from llmpipe.resumption import Before
from llmpipe.runners.base import BaseLLMRunner
from llmpipe.scorers import scorers_named
from llmpipe.sharegpt import CONVERSATIONS

log = logging.getLogger(__name__)


class Material(NamedTuple):
    """What a run works on."""

    dataset: Dataset
    scan: Scan
    """What one reading of the whole dataset found in it."""
    types: ColumnTypes | None
    """The types of its columns, where the format of the answers needs them."""


def look_through(config: RunConfig, inputs: Inputs | None = None, before: Before | None = None) -> Material:
    """Refuse what can be refused before anything is loaded or written.

    Args:
        config: The run.
        inputs: Keeps what of the dataset can be read only once.
        before: The run that is to be continued: whether the dataset has grown since can then be told.

    Raises:
        LLMConfigError, DatasetError, MissingDependencyError: the run cannot start.
    """
    dataset, types = Dataset(config.dataset, inputs), column_types(config.output)
    check_trusted(backend_values(config).get("_target_", "???"), config.trusted_modules)
    template = None if config.prompt.template is None else template_columns(config.prompt.template)
    also = {*all_names(config.output.prefix, config.metrics.scorers), *OTHER_NAMES}
    scan = dataset.scan(template, None if types is None else types.add, None if before is None else before.rows, also)
    layout_of(config, scan.columns, config.sampling.n)  # for what it refuses, as the next one
    scorers_named(config.metrics.scorers)
    if config.prompt.format is PromptFormat.raw:  # else the model's files have to be asked
        _refuse_what_needs_chats(config, scan, chat=False)
    if not scan.rows:
        log.warning("the dataset has no rows")
    if config.sampling.n > 1 and config.sampling.is_greedy:
        log.warning("sampling.n=%d, and all will be alike: sampling.temperature is 0", config.sampling.n)
    return Material(dataset, scan, types)


def runs_chats(config: RunConfig, scan: Scan, runner: BaseLLMRunner) -> bool:
    """Say whether plain prompts become chats.

    Raises:
        LLMConfigError: the model has no chat template, and is asked for chats or for what only chats have.
    """
    chat = runner.is_chat(config.prompt.format)
    _refuse_what_needs_chats(config, scan, chat)
    return chat


def mention_unread(config: RunConfig, scan: Scan, chat: bool) -> None:
    """Say which columns look as if they were meant to be read, and are not."""
    unread = unread_columns(config.prompt, config.dataset.columns, scan.columns, chat)
    if unread:
        log.warning("nothing reads the columns %s", ", ".join(f"{name} ({why})" for name, why in unread.items()))


def _refuse_what_needs_chats(config: RunConfig, scan: Scan, chat: bool) -> None:
    """Refuse a system message, or what else only a chat template takes, where there are no chats.

    Raises:
        LLMConfigError: says what to do.
    """
    if chat or {config.dataset.columns.messages, CONVERSATIONS} & set(scan.columns):
        return
    for name in ("system", "tools", "chat_template_kwargs"):
        if getattr(config.prompt, name) not in (None, {}):
            raise LLMConfigError(
                f"prompt.{name}= needs chats, and these prompts go in raw: use prompt=chat, or drop it"
            )

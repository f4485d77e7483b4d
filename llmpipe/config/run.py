"""The options of a whole run, and of its parts that are neither backend nor sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from llmpipe.config.checks import auto_or_bool, check, count, number
from llmpipe.config.choices import ControlTokens, DeviceType, OnError, Overflow, PromptFormat
from llmpipe.config.conversion import settle
from llmpipe.config.options import option
from llmpipe.config.sampling import SamplingConfig
from llmpipe.config.values import describe
from llmpipe.redaction import References, as_written


@dataclass
class DeviceConfig:
    """Where the model runs."""

    type: str = option("auto", "auto, cpu, cuda or mps.")
    index: int | None = option(None, "Which of several, as in cuda:1.")

    def __post_init__(self) -> None:
        """Refuse a device that does not exist.

        Raises:
            LLMConfigError: lists the devices there are.
        """
        settle(self, "device.")
        names = [member.value for member in DeviceType]
        check(
            self.type in names,
            "device",
            self.type,
            f"one of {', '.join(names)} (cuda:1 picks one of several)",
        )
        if self.index is not None:
            count("device.index", self.index, 0, "an integer >= 0, or null")

    @classmethod
    def parse(cls, device: DeviceConfig | DeviceType | str | None) -> DeviceConfig:
        """Read `cuda`, `cuda:1`, a `DeviceType`, or None for auto.

        Raises:
            LLMConfigError: the text names no device.
        """
        if isinstance(device, DeviceConfig):
            return device
        text = device.value if isinstance(device, DeviceType) else str("auto" if device is None else device).lower()
        kind, _, index = text.partition(":")
        if index and not index.isdecimal():
            check(False, "device", text, "such as cpu, cuda or cuda:1")
        return cls(type=kind, index=int(index) if index else None)

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


@dataclass
class ColumnsConfig:
    """What the dataset calls its columns. Every other column rides along untouched."""

    id: str | None = option(
        "id",
        "Unique names of the rows; rows without one are called row-0, row-1, … by position; with null, all rows are.",
    )
    prompt: str = option("prompt", "Plain prompts.")
    messages: str = option("messages", "Chats: lists of {role, content}. Used before prompt where a row has both.")
    reference: str = option(
        "reference",
        "Right answers, for the scorers: text, a number, true, a date, …; one, or a list of which any will do.",
    )
    tools: str | None = option(
        "tools",
        "What the model may call in a chat: lists of tools in OpenAI's format, instead of prompt.tools; null: none.",
    )
    chat_template_kwargs: str | None = option(
        "chat_template_kwargs",
        "Objects of arguments for the chat template, above those of prompt.chat_template_kwargs; null: none.",
    )
    sampling: str = option("sampling", "Objects of sampling options that override the run's for their row.")

    def __post_init__(self) -> None:
        """Refuse values of another type.

        Raises:
            LLMConfigError: names the option and the value.
        """
        settle(self, "dataset.columns.")


@dataclass
class CsvConfig:
    """How CSV is written."""

    delimiter: str = option(
        "auto", "What parts the cells: one character, or comma, semicolon, tab or pipe; auto asks the header."
    )

    def __post_init__(self) -> None:
        """Refuse what cannot part cells.

        Raises:
            LLMConfigError: names the option and the value.
        """
        named = self.delimiter in ("auto", "comma", "semicolon", "tab", "pipe", "\\t")
        allowed = "one character, or comma, semicolon, tab, pipe or auto"
        check(
            named or (len(self.delimiter) == 1 and self.delimiter not in '"\r\n'),
            "dataset.csv.delimiter",
            self.delimiter,
            allowed,
        )


@dataclass
class DatasetConfig:
    """Which rows to run."""

    path: Any = option(
        "???",
        "A file, a directory, a glob, or a list of them: .jsonl, .json, .csv, .tsv or .parquet; text may be packed.",
    )
    format: str = option(
        "auto", "jsonl, json, csv, tsv or parquet, where neither a file's content nor its name says it."
    )
    csv: CsvConfig = option(CsvConfig(), "How CSV is written.")
    columns: ColumnsConfig = option(
        ColumnsConfig(), "What the dataset calls its columns; a path such as body.messages goes inside of one."
    )
    shuffle: int | None = option(
        None,
        "A seed that puts rows in random order, each keeping its id; files are read once per 65,536 rows or 256 MB.",
    )
    offset: int = option(0, "Leave out the first rows, in the order of shuffle, this many.")
    limit: int | None = option(
        None, "Run only the first rows after the offset, this many; a run can be resumed with a larger limit."
    )
    field: str | None = option(
        None,
        "The list of rows inside a JSON file's one object: a key or path, as data.examples; by default its only list.",
    )
    max_row_mb: float = option(
        256, "Rows of more MB, as they stand in their file, are error rows, and are passed over in little memory."
    )

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            LLMConfigError: names the option and the value.
        """
        settle(self, "dataset.")
        paths = [self.path] if isinstance(self.path, (str, Path)) else self.path
        are_paths = isinstance(paths, Sequence) and all(isinstance(path, (str, Path)) for path in paths)
        check(are_paths, "dataset.path", self.path, "a file, a glob or a list of them")
        if self.limit is not None:
            count("dataset.limit", self.limit, 0, "an integer >= 0, or null", None)
        if self.shuffle is not None:
            count("dataset.shuffle", self.shuffle, 0, "an integer >= 0, or null", None)
        count("dataset.offset", self.offset, 0, "an integer >= 0", None)
        number("dataset.max_row_mb", self.max_row_mb, 0, 1e6, "a number in (0, 1e6]", open_low=True)

    @property
    def max_row_bytes(self) -> int:
        """`max_row_mb` in bytes."""
        return max(1, int(self.max_row_mb * 1e6))

    @property
    def paths(self) -> list[str]:
        """The configured paths or globs as a list."""
        return [str(self.path)] if isinstance(self.path, (str, Path)) else [str(path) for path in self.path]


@dataclass
class PromptConfig:
    """How a row becomes a prompt."""

    format: PromptFormat = option(
        PromptFormat.auto,
        "auto, chat or raw; says what a plain prompt becomes. Chats are always rendered by the chat template.",
    )
    system: str | None = option(
        None, "A system message put before chats and plain prompts that have none (not with raw)."
    )
    template: str | None = option(
        None, "Text in which {column} stands for the row's value, instead of the prompt column; {{ and }} are braces."
    )
    tools: Any = option(None, "What the model may call in chats, in OpenAI's format: a JSON file, or a list of tools.")
    chat_template_kwargs: dict[str, Any] = option(
        {}, "Further arguments for the chat template, such as {enable_thinking: false}."
    )
    continue_final: Any = option(
        "auto",
        "true, false or auto: go on with a chat's last message instead of closing it; auto if it is the assistant's.",
    )
    overflow: Overflow = option(Overflow.error, "error or truncate a prompt that exceeds the context.")
    control_tokens: ControlTokens = option(
        ControlTokens.literal,
        "literal or parse: what a control token's text is inside of a message. Raw prompts are always parsed.",
    )
    add_bos: Any = option(
        "auto",
        "auto, true or false: BOS before a prompt. auto: before raw text, as the model says, unless it begins with it.",
    )

    def __post_init__(self) -> None:
        """Refuse values of another type or out of range.

        Raises:
            LLMConfigError: names the option and the value.
        """
        settle(self, "prompt.")
        auto_or_bool("prompt.continue_final", self.continue_final)
        auto_or_bool("prompt.add_bos", self.add_bos)


@dataclass
class OutputConfig:
    """How the answers are written."""

    format: str = option("jsonl", "jsonl or parquet.")
    prefix: str = option("", "Put before the name of every column that llmpipe adds.")
    source: bool = option(False, "Add source_file and source_line: where each row stands in the dataset.")

    def __post_init__(self) -> None:
        """Refuse values of another type.

        Raises:
            LLMConfigError: names the option and the value.
        """
        settle(self, "output.")


@dataclass
class MetricsConfig:
    """What is measured."""

    scorers: list[str] = option(
        ["exact_match"],
        "Scores of rows with a reference: exact_match (the same text, outer white space aside), contains.",
    )
    memory_interval_s: float = option(0.05, "Seconds between two looks at the process's memory.")

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            LLMConfigError: names the option and the bounds.
        """
        settle(self, "metrics.")
        number("metrics.memory_interval_s", self.memory_interval_s, 0, 60, "a number in (0, 60]", open_low=True)


@dataclass
class RunConfig:
    """A whole run."""

    backend: Any = option("???", "Which runner, and its options.")
    device: DeviceConfig = option(DeviceConfig(), "Where the model runs.")
    sampling: SamplingConfig = option(SamplingConfig(), "How tokens are chosen.")
    dataset: DatasetConfig = option(DatasetConfig(), "Which rows to run.")
    prompt: PromptConfig = option(PromptConfig(), "How a row becomes a prompt.")
    output: OutputConfig = option(OutputConfig(), "How the answers are written.")
    metrics: MetricsConfig = option(MetricsConfig(), "What is measured.")
    seed: int = option(0, "Seed of the run; every row and sample derives its own from it.")
    on_error: OnError = option(
        OnError.quarantine, "quarantine error rows in errors.jsonl, or stop at the first one; the run can be resumed."
    )
    max_error_rate: float | None = option(
        None,
        "End the run if more than this share of 100 or more rows (or all), resumed ones too, are errors; null: never.",
    )
    run_timeout_s: float | None = option(
        None, "End the run, resumable, after so many seconds of generating; native code that hangs has to be isolated."
    )
    trusted_modules: list[str] = option(
        [], "Modules whose code a _target_ may name, Hydra's nodes included; no group can trust, nor a run directory."
    )

    references = cast(References, MappingProxyType({}))
    """What was written where options came from the environment; no option itself, so it has no annotation."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            LLMConfigError: names the option and the bounds.
        """
        settle(self)
        count("seed", self.seed, 0, "an integer >= 0", None)
        self._take_seed()
        if self.max_error_rate is not None:
            number("max_error_rate", self.max_error_rate, 0, 1, "a number in (0, 1], or null", open_low=True)
        if self.run_timeout_s is not None:
            number("run_timeout_s", self.run_timeout_s, 0, 1e9, "a number > 0, or null", open_low=True)

    def replace(self, changes: Mapping[str, Any]) -> RunConfig:
        """Return a copy with other values; it still knows which values came from the environment."""
        copy = replace(self, **changes)
        copy.references = self.references
        return copy

    def written(self) -> dict[str, Any]:
        """Return the options as plain values that may be shown: references where values came from the environment."""
        listing: dict[str, Any] = as_written(describe(self), self.references)
        return listing

    def _take_seed(self) -> None:
        """Make a `sampling.seed` of all rows the run's seed: as each row's own, all would draw the same numbers.

        Raises:
            LLMConfigError: the run has another seed already.
        """
        given = self.sampling.seed
        if given is None:
            return
        check(self.seed in (0, given), "seed", self.seed, f"sampling.seed={given}, or one of the two left out")
        self.seed = given
        self.sampling = self.sampling.replace({"seed": None})

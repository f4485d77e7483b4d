"""The figures of `metrics.json`: what each is, and how a person reads it, in the terminal, the report and the docs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llmpipe.units import count, memory, seconds, shares


class Figure(NamedTuple):
    """A key of `metrics.json`.

    `note` and `said` are patterns, into which the values of figures go by their keys, in words.
    """

    key: str
    definition: str
    """What it is, in Markdown."""
    show: Callable[[Any], str] = str
    """Puts its value into words."""
    title: str = ""
    """What the report's tile is called; without one, the report has none."""
    note: str = ""
    """What stands below the value there."""
    line: str = ""
    """The line of the terminal's summary that it is on, with others of that name; without one, it is on none."""
    said: str = ""
    """What it says there; without it, its value."""
    bad: bool = False
    """Whether any of it is bad news."""

    @property
    def distribution(self) -> bool:
        """Whether it has percentiles."""
        return self.show is shares


class Shown(NamedTuple):
    """A figure of a run, in words."""

    title: str
    value: str
    note: str
    line: str
    said: str
    bad: bool


FIGURES = (
    Figure(
        "rows",
        "rows of the dataset that the run was asked for",
        count,
        line="rows",
        said="{rows} ({rows_ok} ok, {rows_error} errors)",
    ),
    Figure("rows_ok", "rows all of whose samples have an answer", count, "rows", "of {rows} are ok"),
    Figure(
        "rows_error",
        "rows that could not be read or run, or a sample of which failed; they are in `errors.jsonl`",
        count,
        "errors",
        "rows",
        bad=True,
    ),
    Figure(
        "error_reasons",
        "the most frequent reasons, alike but for numbers and quoted text: `rows` that had it, and `reason`, `file` "
        "and `line` of one; of more than 200 kinds, `rows` is a lower bound, and `exact` false",
    ),
    Figure("completions", "answers", count),
    Figure(
        "finish_reasons",
        "samples by how they ended: `stop` (end token or stop string), `length` (`sampling.max_tokens`, or the "
        "context), `error`",
    ),
    Figure(
        "prompt_tokens",
        "tokens of the prompts of all answers; a prompt counts once for each of its samples",
        count,
        line="tokens",
        said="{prompt_tokens} prompt",
    ),
    Figure(
        "cached_prompt_tokens",
        "of those, the ones that were copied from a shared prefix and not computed",
        count,
    ),
    Figure(
        "completion_tokens",
        "generated tokens of all answers, end tokens not counted",
        count,
        line="tokens",
        said="{completion_tokens} generated",
    ),
    Figure("truncated_prompts", "answers whose prompt was cut to fit the context", count),
    Figure(
        "prompt_tokens_per_s",
        "`prompt_tokens / wall_s`: of the wall, with everything that a run does meanwhile, copied tokens included",
        count,
        "prompt tokens/s",
        "{prompt_tokens} tokens, {cached_prompt_tokens} cached",
        "speed",
        "{prompt_tokens_per_s} prompt tokens/s",
    ),
    Figure(
        "completion_tokens_per_s",
        "`completion_tokens / wall_s`",
        count,
        "generated tokens/s",
        "{completion_tokens} tokens",
        "speed",
        "{completion_tokens_per_s} generated tokens/s",
    ),
    Figure("rows_per_s", "`rows / wall_s`", count),
    Figure(
        "prefill_tokens_per_s",
        "prompt tokens that the engine computed, over the time in which it computed prompts; of the last attempt",
        count,
        "prefill tokens/s",
        "of the engine's own time",
        "engine",
        "{prefill_tokens_per_s} prefill tokens/s",
    ),
    Figure(
        "decode_tokens_per_s",
        "tokens that the engine generated, over the time in which it computed them, all rows in flight together; of "
        "the last attempt",
        count,
        "decode tokens/s",
        "of the engine's own time",
        "engine",
        "{decode_tokens_per_s} decode tokens/s of its own time",
    ),
    Figure(
        "load_s",
        "time to load the model, in the last attempt",
        seconds,
        "load time",
        "before generating",
        "time",
        "{load_s} loading",
    ),
    Figure(
        "wall_s",
        "time from the loaded model to the last answer, over all attempts at the run; loading and writing files are "
        "not in it",
        seconds,
        "wall time",
        "generating",
        "time",
        "{wall_s} generating",
    ),
    Figure(
        "latency_s",
        "of each answer, from the moment the runner pulled its row to its last token",
        shares,
        line="latency",
    ),
    Figure(
        "queue_s",
        "of each answer, from the moment the runner pulled its row until it had a slot: a batching runner pulls rows "
        "ahead, to order them and to find what they share",
        shares,
        line="in the queue",
    ),
    Figure(
        "service_s",
        "of each answer, from its admission to a slot to its last token: `latency_s - queue_s`",
        shares,
        line="service",
    ),
    Figure(
        "first_token_s",
        "of each answer, from the moment the runner pulled its row to its first text",
        shares,
        line="first token",
    ),
    Figure(
        "peak_rss_mb",
        "the most resident memory that was seen while the run went on, of this process and of the one that an "
        "isolated model is in, over all attempts at it; looked at every `metrics.memory_interval_s=` seconds. What "
        "earlier jobs of a sweep freed is given back before; the libraries that they loaded stay, and are in it",
        memory,
        "peak memory",
        "resident",
        "peak memory",
        "{peak_rss_mb} resident",
    ),
    Figure(
        "peak_device_mb",
        "the most memory of a GPU that the model and its cache took, since the model was loaded",
        memory,
        "peak device memory",
        "of the model and its cache",
        "peak memory",
        "{peak_device_mb} on the device",
    ),
    Figure(
        "scores",
        "of each scorer, the mean over samples whose row has a reference; a sample that failed scores 0",
    ),
    Figure("scored_samples", "of each scorer, how many samples that was"),
    Figure("prompt_format", "whether plain prompts became chats (`chat`) or went in as they are (`raw`)"),
    Figure("started_at", "when the run began, in UTC"),
    Figure("finished_at", "when its last answer was there, in UTC"),
    Figure("seed", "of the run"),
    Figure("model_digest", "what tells the model's files from others"),
    Figure("dataset_digest", "what tells the dataset's rows from others"),
    Figure(
        "runner",
        "what the runner says of itself: model, type, `parameters` (weights in the model's tensors, shared ones "
        "once), device, sizes and why they are what they are, versions",
    ),
    Figure("environment", "versions, and the cores and the memory that the process may use"),
    Figure("output", "name of the file of answers"),
)


def shown_figures(metrics: dict[str, Any]) -> Iterator[Shown]:
    """Yield what a person reads of a run's figures; one that cannot be told is left out."""
    found = {figure: metrics.get(figure.key) for figure in FIGURES}
    words = {figure.key: "–" if value is None else figure.show(value) for figure, value in found.items()}
    for figure, value in found.items():
        if value is None or (figure.distribution and value["p50"] is None):
            continue
        note, said = figure.note.format_map(words), figure.said.format_map(words) or words[figure.key]
        yield Shown(figure.title, words[figure.key], note, figure.line, said, figure.bad and bool(value))

"""The objects that travel: a `Row` becomes a `Request`, a runner makes `Chunk`s of it, a `Completion` is their sum.

Knows nothing of files, models or configuration beyond the sampling options that ride on each request. None of them is
frozen, because that would quadruple what making one takes, and there are millions; treat them as if they were.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmpipe.cells import as_id, lookup
from llmpipe.exceptions import presentable
from llmpipe.seeds import derive_seed

if TYPE_CHECKING:
    import pyarrow as pa

    from llmpipe.config import SamplingConfig

Message = dict[str, Any]
"""One turn of a chat: at least `role` and `content`, as in OpenAI's format."""


@dataclass(slots=True)
class Row:
    """One row of the dataset, readable or not."""

    file: str
    line: int
    """Line in the file, from 1; the number of the row for formats without lines."""
    values: dict[str, Any] = field(default_factory=dict)
    raw: bytes | None = None
    """The row as it stands in the file, where the file is text."""
    error: str | None = None
    """Why the row cannot be read; its values are then empty."""
    batch: tuple[pa.RecordBatch, int] | None = None
    """For Parquet: the Arrow batch with the row, and its position there."""
    index: int = -1
    """Position among the rows of the run, from 0, unreadable rows counted; a reader leaves it to the dataset."""
    position: int | None = None
    """Position in the dataset's files, from 0, where it is another one."""
    typed: bool = True
    """Whether its values are what they were written as; in CSV all are text."""

    @property
    def size(self) -> int:
        """About how many bytes the row takes in its file; for Parquet, the mean of its batch in memory."""
        if self.raw is not None:
            return len(self.raw)
        if self.batch is not None:
            return int(self.batch[0].nbytes // self.batch[0].num_rows)
        return sum(len(value) for value in self.values.values() if isinstance(value, str))

    def value(self, column: str) -> Any:
        """Return what a column holds, or a field inside one, as `body.messages` names it; None where nothing does."""
        return lookup(self.values, column)

    def id(self, column: str | None) -> str | int | float:
        """Return the row's id: what its id column says, or `row-N` by its position in the files."""
        own = self.own_id(column)
        return f"row-{self.index if self.position is None else self.position}" if own is None else own

    def own_id(self, column: str | None) -> str | int | float | None:
        """Return what the row's id column says; None where it says nothing, or there is none."""
        return None if column is None else as_id(self.value(column))


@dataclass(slots=True)
class Request:
    """One row to run.

    Exactly one of `messages` (rendered by the model's chat template) and `prompt` (tokenised as it is) is used.
    """

    id: int
    """Names the row in the chunks that answer it; unique among the requests of one stream."""
    sampling: SamplingConfig
    prompt: str = ""
    messages: tuple[Message, ...] | None = None
    seed: int = 0
    """The row's own seed; every sample derives its random stream from it, see `seed_of`."""
    samples: tuple[int, ...] = (0,)
    """Which of the row's `sampling.n` samples to generate (a resumed run asks for those it lacks)."""
    truncate: bool = False
    """Cut a prompt that exceeds the context from the left, instead of refusing the row."""
    tools: tuple[dict[str, Any], ...] | None = None
    """What the model may call, in OpenAI's format; the chat template is told of them."""
    template_kwargs: dict[str, Any] | None = None
    """Further names that the chat template may ask for, such as `enable_thinking`."""
    continue_final: bool = False
    """The last message is the beginning of the answer, which goes on from there."""
    literal: bool = True
    """Control tokens that the words of a chat spell are text; those of a plain prompt never are."""
    add_bos: bool | None = None
    """Whether the prompt begins with BOS in any case; None where the model and the text decide, False to add none."""

    def seed_of(self, sample: int) -> int:
        """Return the seed of one sample; it depends on nothing but the row's seed and the sample's number."""
        return derive_seed(self.seed, sample)


@dataclass(slots=True)
class Chunk:
    """A piece of one sample's answer, in the order it was generated.

    The last chunk of a sample carries its `finish_reason` and the counts; the others carry text.
    """

    request_id: int
    sample: int = 0
    text: str = ""
    finish_reason: str | None = None
    """`stop` (end token or stop string), `length` (max_tokens or context), or `error`; None while more follows."""
    error: str | None = None
    prompt_tokens: int | None = None
    cached_prompt_tokens: int | None = None
    """How many of the prompt's tokens were not computed for this sample but copied from a shared prefix."""
    truncated_prompt_tokens: int | None = None
    completion_tokens: int | None = None
    """Generated tokens, the end token not counted."""
    started_at: float | None = None
    """`time.perf_counter()` at which the runner began to work on the sample."""
    restarts: bool = False
    """The sample is begun again: the text before this chunk does not count."""


@dataclass(slots=True)
class Completion:
    """The whole answer to one sample of one row. Times are in seconds, from the moment the runner pulled the row."""

    request_id: int
    sample: int = 0
    text: str | None = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    cached_prompt_tokens: int | None = None
    truncated_prompt_tokens: int | None = None
    completion_tokens: int | None = None
    queue_s: float | None = None
    first_token_s: float | None = None
    latency_s: float | None = None
    error: str | None = None
    scores: dict[str, float] = field(default_factory=dict)


def failed(request_id: int, reason: str, sample: int = 0) -> Completion:
    """Return the completion of a sample that could not be run."""
    return Completion(request_id, sample, text=None, finish_reason="error", error=presentable(reason))


def error_chunk(request_id: int, reason: str, sample: int = 0) -> Chunk:
    """Return the chunk that ends a sample which cannot be run, or not to its end."""
    return Chunk(request_id, sample, finish_reason="error", error=reason)


def error_chunks(request: Request, reason: str) -> list[Chunk]:
    """Return the chunks that end every sample of a request that cannot be run."""
    return [error_chunk(request.id, reason, sample) for sample in request.samples]

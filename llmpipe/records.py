"""The objects that travel: a `Row` becomes a `Request`, a runner makes `Chunk`s of it, a `Completion` is their sum.

Knows nothing of files, models or configuration beyond the sampling options that ride on each request. None of them is
frozen, because that would quadruple what making one takes, and there are millions; treat them as if they were.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmpipe.cells import as_id
from llmpipe.exceptions import MOST_CHARACTERS, LLMInferenceError
from llmpipe.quoting import shortened
from llmpipe.redaction import redacted

if TYPE_CHECKING:
    import pyarrow as pa

    from llmpipe.config import SamplingConfig

Message = dict[str, Any]
"""One turn of a chat: at least `role` and `content`, as in OpenAI's format."""


def derive_seed(*parts: object) -> int:
    """Hash `parts` to a seed in [0, 2**64), the same on every machine and in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def is_utf8(text: str) -> bool:
    """Say whether UTF-8 can hold the text; it cannot hold half of a surrogate pair, which JSON can smuggle in."""
    if text.isascii():  # as Python knows at once
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def harmless(text: str) -> str:
    r"""Return text in which what a terminal would obey, or not show, is spelt out, such as `\x1b`."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class UnusableText(ValueError):
    """What a row says cannot be run, though nothing is wrong with the way its file has it."""


def lookup(values: Any, path: str) -> Any:
    """Return what stands under a name, or else under a dotted path through objects; None where nothing does."""
    if not isinstance(values, dict):
        return None
    if path in values or "." not in path:
        return values.get(path)
    dots = (i for i, character in enumerate(path) if character == ".")
    inner = (lookup(values[path[:i]], path[i + 1 :]) for i in dots if path[:i] in values)
    return next((value for value in inner if value is not None), None)


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
        """About how many bytes the row has in its file, or, of a Parquet file, its like in memory."""
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


_NOT_WAITING: tuple[float, set[int]] = 0.0, set()
StreamFn = Callable[[Iterable[Request]], Iterator[Chunk]]
Tick = Callable[[], None]
"""Called at each step of a stream; what it raises ends the stream."""


def no_tick() -> None:
    """Go on, whatever happens."""


class Stopwatch:
    """Turns the chunks of a stream into completions, timing from outside what a runner cannot be trusted to time."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[float, set[int]]] = {}
        """When each request was pulled, and which of its samples have no answer yet."""
        self._open: dict[tuple[int, int], tuple[Completion, list[str]]] = {}

    def watch(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Pass `requests` on, noting when each one is pulled."""
        for request in requests:
            self._waiting[request.id] = time.perf_counter(), set(request.samples)
            yield request

    def add(self, chunk: Chunk) -> Completion | None:
        """Take one chunk; return the completion when it was the last of its sample.

        Raises:
            LLMInferenceError: the chunk answers what was not asked, or has been answered.
        """
        now = time.perf_counter()
        key = (chunk.request_id, chunk.sample)
        pulled_at, waiting = self._waiting.get(chunk.request_id, _NOT_WAITING)
        if chunk.sample not in waiting:
            raise LLMInferenceError(
                f"the runner answered request {key[0]}, sample {key[1]}, which is not waiting for one"
            )
        begun = self._open.pop(key, None)
        completion, texts = begun or (Completion(*key), [])
        if chunk.restarts:
            texts.clear()
            completion.first_token_s = None
        if chunk.text:
            texts.append(chunk.text)
        if completion.first_token_s is None and (chunk.text or chunk.finish_reason):
            completion.first_token_s = now - pulled_at
        if chunk.finish_reason is None:
            self._open[key] = completion, texts
            return None
        waiting.discard(chunk.sample)
        if not waiting:
            del self._waiting[chunk.request_id]
        completion.finish_reason = chunk.finish_reason
        completion.latency_s = now - pulled_at
        completion.prompt_tokens = chunk.prompt_tokens
        completion.cached_prompt_tokens = chunk.cached_prompt_tokens
        completion.truncated_prompt_tokens = chunk.truncated_prompt_tokens
        completion.completion_tokens = chunk.completion_tokens
        if chunk.started_at is not None:
            completion.queue_s = max(0.0, chunk.started_at - pulled_at)
        if chunk.finish_reason == "error":
            completion.error = _reason(chunk.error or "the runner gave no reason")
            completion.text = completion.first_token_s = None
        else:
            completion.text = "".join(texts)
        return completion

    def under_way(self) -> list[int]:
        """Return how many chunks with text there are of each sample that has begun and not ended: about its tokens."""
        return [len(texts) for _, texts in self._open.values()]

    def abandoned(self) -> Iterator[Completion]:
        """Yield an error for every sample that was pulled and never finished."""
        for request_id, (_, samples) in self._waiting.items():
            for sample in sorted(samples):
                yield failed(request_id, "the runner ended without an answer", sample)


def failed(request_id: int, reason: str, sample: int = 0) -> Completion:
    """Return the completion of a sample that could not be run."""
    return Completion(request_id, sample, text=None, finish_reason="error", error=_reason(reason))


def _reason(text: str) -> str:
    """Return why there is no answer, as it may be kept."""
    return shortened(redacted(text), MOST_CHARACTERS)


def complete(
    stream: StreamFn,
    requests: Iterable[Request],
    tick: Tick = no_tick,
    each_chunk: bool = True,
    stopwatch: Stopwatch | None = None,
) -> Iterator[Completion]:
    """Run `requests` through a runner's `stream` and yield each sample's completion as it finishes.

    Args:
        stream: Answers them.
        requests: What to answer.
        tick: Called before it is said of a sample that it got no answer.
        each_chunk: Call `tick` after each chunk as well: `stream` does not do so by itself.
        stopwatch: Times them; whoever made it can see what is under way.
    """
    stopwatch = stopwatch or Stopwatch()
    chunks = stream(stopwatch.watch(requests))
    try:
        for chunk in chunks:
            completion = stopwatch.add(chunk)
            if completion is not None:
                yield completion
            if each_chunk:
                tick()
    finally:
        if isinstance(chunks, Generator):
            chunks.close()
    for completion in stopwatch.abandoned():
        tick()
        yield completion

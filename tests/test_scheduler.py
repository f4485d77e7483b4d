"""The engine over a model of a few lines: whatever comes, goes, runs out or breaks, every sample ends once, as alone.

The model is a function of all tokens before, so that a token in the wrong slot, at the wrong place or left over from
another row changes the answer. Its contexts refuse what no backend could compute.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from llmpipe.config import LlamaCppConfig, SamplingConfig
from llmpipe.exceptions import LLMInferenceError, LLMInitializationError, LLMOutOfMemoryError
from llmpipe.records import Chunk, Request
from llmpipe.runners.batching import Batch, Engine, Footprint, Sample, Sizes, sizing
from llmpipe.runners.batching.executor import NO_NUMBERS
from llmpipe.runners.batching.sequence import Sequence as Row

VOCABULARY, END, BROKEN = 29, 0, 28
LIMIT = 200


def after(tokens: Sequence[int]) -> int:
    """Return the token that the model says next; -1 where it computes NaN."""
    if BROKEN in tokens:
        return -1
    return (sum(i * token for i, token in enumerate(tokens, 1)) + len(tokens)) % VOCABULARY


class Greedy:
    def close(self) -> None:
        pass


class Letters:
    def push(self, token: int) -> str:
        return chr(ord("A") + token)


@dataclass
class Faults:
    """What goes wrong: at which call there is too little memory or an error, and the largest context."""

    compute: set[int] = field(default_factory=set)
    sample: set[int] = field(default_factory=set)
    most_tokens: int = 2**31
    crash: int = -1


class Memory:
    """A context that holds the tokens of its slots, and computes nothing that does not follow upon them."""

    def __init__(self, model: Model, sizes: Sizes) -> None:
        self.sizes = sizes
        self.model = model
        capacity = sizes.slots * sizes.context if model.is_static else max(sizes.batch_tokens, sizes.slots, 2)
        self.batch = Batch(capacity)
        self.slots: list[list[int]] = [[] for _ in range(max(sizes.slots + sizes.prefixes, 2))]
        self.is_closed = self.is_spoiled = False
        self.outputs: list[int] = []

    def compute(self) -> None:
        call = next(self.model.calls)
        if call in self.model.faults.compute:
            raise LLMOutOfMemoryError("out of memory")
        if call == self.model.faults.crash:
            raise LLMInferenceError("the model fails")
        batch, begun = self.batch, set()
        self.outputs = []
        assert batch.size and not self.is_closed
        if self.model.is_static and 0 in batch.positions[: batch.size]:
            assert not any(self.slots)
        columns = (batch.tokens, batch.positions, batch.slots, batch.outputs)
        for token, position, slot, output in zip(*(c[: batch.size].tolist() for c in columns), strict=True):
            held = self.slots[slot]
            assert position == len(held) < self.sizes.context
            if not position:
                begun.add(slot)
            held.append(token)
            if output:
                self.outputs.append(-1 if self.is_spoiled and slot in begun else after(held))
        decoded = batch.slots[: batch.size].tolist()
        if self.model.never_alone and self.model.reproducible and len(set(decoded)) == batch.size > 1:
            assert decoded == list(range(decoded[0], decoded[0] + batch.size))

    def sample(self, samplers: Sequence[Any]) -> list[int]:
        if next(self.model.samples) in self.model.faults.sample:
            raise LLMOutOfMemoryError("out of memory")
        tokens = self.outputs[: len(samplers)]
        self.is_spoiled |= self.model.keeps_nan and -1 in tokens
        return tokens

    def copy(self, source: int, target: int) -> None:
        assert not self.model.is_static and source != target and not self.slots[target]
        self.slots[target] = list(self.slots[source])

    def forget(self, slot: int) -> None:
        self.slots[slot] = []

    def close(self) -> None:
        assert not self.is_closed
        self.is_closed = True


class Model:
    """An executor of such contexts."""

    def __init__(self, config: LlamaCppConfig, faults: Faults, is_static: bool, keeps_nan: bool) -> None:
        self.config, self.faults, self.is_static, self.keeps_nan = config, faults, is_static, keeps_nan
        self.reproducible, self.never_alone = config.reproducible, not is_static
        self.calls, self.samples = itertools.count(), itertools.count()
        self.footprint = Footprint(parameters=1, cache_bytes_per_token=1)

    @property
    def ideal(self) -> Sizes:
        ideal = sizing.ideal(self.config, self.footprint)
        return replace(ideal, batch_tokens=0) if self.is_static else ideal

    def sizes(self, waiting: Sequence[Sample], limit: int, held_tokens: int = 0, is_live: bool = False) -> Sizes:
        sizes = sizing.choose(self.config, self.footprint, waiting, limit, held_tokens, 2**30, is_live)
        return replace(sizes, prefixes=0, batch_tokens=0) if self.is_static else sizes

    def context(self, sizes: Sizes) -> Memory:
        if sizes.tokens > self.faults.most_tokens:
            raise LLMInitializationError("no room")
        return Memory(self, sizes)

    def used_device_bytes(self) -> int:
        return 0

    def sampler(self, sample: Sample) -> Greedy:
        return Greedy()

    def detokenizer(self, sample: Sample) -> Letters:
        return Letters()

    def is_end(self, token: int) -> bool:
        return token == END


def encode(request: Request) -> tuple[list[int], int]:
    tokens = [ord(letter) - ord("A") for letter in request.prompt]
    if not tokens:
        raise ValueError("empty")
    return tokens, 0


def alone(request: Request) -> tuple[str, str]:
    """Return the text and the finish reason that a request has coming."""
    tokens, _ = encode(request)
    row = Row(Sample(request, 0, tokens, 0, 0), Greedy(), Letters(), LIMIT)
    text = ""
    while (token := after(row.tokens)) >= 0:
        chunk = row.add(token, token == END)
        text += chunk.text if chunk else ""
        if chunk and chunk.finish_reason:
            return text, chunk.finish_reason
    return text, "error"


def check(engine: Engine) -> None:
    """Check that a slot has one row at most, its cache what was computed of that, and a free one nothing."""
    scheduler: Any = engine.scheduler
    if scheduler._context is None:
        assert not scheduler._running
        return
    context: Memory = scheduler._context
    seated = [row.slot for row in scheduler._running]
    assert sorted(seated + scheduler._free) == list(range(context.sizes.slots))
    assert all(context.slots[row.slot] == row.tokens[: row.cached] for row in scheduler._running)
    assert not any(context.slots[slot] for slot in scheduler._free)
    assert all(row.slot == -1 and not row.cached for row in scheduler._suspended)
    for prefix in scheduler._prefixes._prefixes:
        assert not prefix.tokens or context.slots[prefix.slot] == prefix.tokens[: prefix.cached]
    rows = [*scheduler._prefilling, *scheduler._sharing]
    assert all(row in scheduler._running for row in rows)


LETTERS = [chr(ord("A") + token) for token in range(1, VOCABULARY)]
HEADS = ["", "", "BCDE" * 9, "BCDE" * 9 + "FGHI" * 9, "KLM" * 12]
requests = st.lists(
    st.builds(
        lambda head, tail, options, stop, n: (head + tail, {**options, "n": n, "stop": stop}),
        st.sampled_from(HEADS),
        st.text(st.sampled_from(LETTERS[:12]), max_size=12) | st.sampled_from(["B" * 60, LETTERS[-1]]),
        st.fixed_dictionaries(
            {"max_tokens": st.sampled_from([1, 2, 5, 20, 90]), "ignore_eos": st.booleans()},
            optional={"stop_token_ids": st.just([3, 4])},
        ),
        st.sampled_from([[], [], ["Q"], ["ABC", "B"]]),
        st.sampled_from([1, 1, 1, 2, 5]),
    ),
    max_size=14,
)
calls = st.sets(st.integers(0, 60), max_size=6)
faults = st.builds(Faults, calls, calls, st.sampled_from([2**31, 2**31, 256, 512, 1100, 2300]))
configs = st.builds(
    LlamaCppConfig,
    slots=st.sampled_from(["auto", 1, 2, 3, 5]),
    reproducible=st.booleans(),
    batch_tokens=st.sampled_from([1, 7, 64, 2048]),
)


def made(config: LlamaCppConfig, faults: Faults, is_static: bool, keeps_nan: bool) -> Engine:
    """Make an engine; as in transformers, what is static and reproducible has rows by themselves."""
    config = replace(config, slots=1) if is_static and config.reproducible else config
    return Engine(Model(config, faults, is_static, keeps_nan), config, LIMIT)


def asked(drawn: list[tuple[str, dict[str, Any]]]) -> list[Request]:
    options = [(prompt, SamplingConfig(**sampling)) for prompt, sampling in drawn]
    return [Request(i, o, prompt, samples=tuple(range(o.n))) for i, (prompt, o) in enumerate(options)]


@settings(max_examples=200, deadline=None)
@given(st.data(), requests, configs, faults, st.booleans(), st.booleans(), st.booleans())
def test_every_sample_ends_once_and_as_alone(
    data: st.DataObject,
    drawn: list[tuple[str, dict[str, Any]]],
    config: LlamaCppConfig,
    faults: Faults,
    is_static: bool,
    keeps_nan: bool,
    is_live: bool,
) -> None:
    wanted = asked(drawn)
    try:
        engine = made(config, faults, is_static, keeps_nan)
    except LLMInitializationError:
        return
    cancelled: set[int] = set()

    def pulled() -> Iterator[Request | None]:
        for request in wanted:
            if is_live and data.draw(st.booleans(), label="none just now"):
                yield None
            yield request

    def tick() -> None:
        check(engine)
        if len(cancelled) < 3 and wanted and data.draw(st.integers(0, 15), label="cancel") == 0:
            number = data.draw(st.integers(0, len(wanted) - 1))
            cancelled.add(number)
            engine.cancel(number)

    texts: dict[tuple[int, int], str] = {(request.id, n): "" for request in wanted for n in request.samples}
    ends: dict[tuple[int, int], Chunk] = {}
    for chunk in engine.stream(pulled(), encode, tick):
        key = chunk.request_id, chunk.sample
        assert key not in ends
        texts[key] += chunk.text
        if chunk.finish_reason:
            ends[key] = chunk
    check(engine)
    assert ends.keys() == texts.keys()
    scheduler: Any = engine.scheduler
    assert not scheduler._running and not scheduler._suspended
    assert scheduler._context is None or not any(scheduler._context.slots[: scheduler._context.sizes.slots])
    for request in wanted:
        for sample in request.samples:
            end = ends[request.id, sample]
            if end.error is None:
                assert (texts[request.id, sample], end.finish_reason) == alone(request)
                assert 0 <= (end.cached_prompt_tokens or 0) < (end.prompt_tokens or 0)
            elif end.error == "empty":
                assert not request.prompt
            elif end.error == "cancelled":
                assert request.id in cancelled
            elif end.error == NO_NUMBERS:
                assert alone(request)[1] == "error"
            elif end.error == "no room":
                assert faults.most_tokens < 2**31
            else:
                assert "out of memory for this row alone" in end.error and (faults.compute or faults.sample)


def test_a_row_that_writes_alone_takes_no_slot_for_company_in_which_another_is_being_read() -> None:
    config = LlamaCppConfig(slots=2, reproducible=True, batch_tokens=1)
    engine = made(config, Faults(), is_static=False, keeps_nan=False)
    options = {"max_tokens": 40, "ignore_eos": True}
    wanted = asked([("BCDEF", options), ("GHI" * 20, options)])
    texts = {0: "", 1: ""}

    def pulled() -> Iterator[Request | None]:
        yield wanted[0]
        yield None
        yield wanted[1]

    for chunk in engine.stream(pulled(), encode, lambda: check(engine)):
        texts[chunk.request_id] += chunk.text
    assert texts == {request.id: alone(request)[0] for request in wanted}


@settings(max_examples=100, deadline=None)
@given(requests, configs, st.integers(0, 40), st.integers(-1, 30), st.booleans())
def test_a_stream_that_ends_anywhere_leaves_the_engine_as_it_was(
    drawn: list[tuple[str, dict[str, Any]]], config: LlamaCppConfig, chunks: int, crash: int, is_static: bool
) -> None:
    faults = Faults(crash=crash)
    engine = made(config, faults, is_static, keeps_nan=True)
    stream = engine.stream(asked(drawn), encode)
    try:
        for _ in itertools.islice(stream, chunks):
            pass
    except LLMInferenceError:
        assert crash >= 0
    stream.close()  # type: ignore[attr-defined]
    faults.crash = -1
    check(engine)
    good = [request for request in asked(drawn) if request.prompt and BROKEN not in encode(request)[0]]
    texts = dict.fromkeys([(request.id, n) for request in good for n in request.samples], "")
    for chunk in engine.stream(good, encode, lambda: check(engine)):
        assert chunk.error in (None, NO_NUMBERS)
        texts[chunk.request_id, chunk.sample] += chunk.text
    assert texts == {(request.id, n): alone(request)[0] for request in good for n in request.samples}


def test_a_slot_that_kept_a_row_company_does_so_again_after_memory_ran_out() -> None:
    """The one row there is fails while a token is chosen, and the next one needs the same company."""
    engine = made(LlamaCppConfig(slots=1, reproducible=True, batch_tokens=7), Faults(sample={1}), False, False)
    ends = list(engine.stream(asked([("B", {"max_tokens": 5, "ignore_eos": True})] * 2), encode))
    assert [end.finish_reason for end in ends if end.finish_reason] == ["error", "length"]

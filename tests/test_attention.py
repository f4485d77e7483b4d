"""Attention over slots against a reference that knows nothing of batches: one token, one head, one key at a time."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpipe.runners.batching import Batch
from llmpipe.runners.transformers.attention import (
    KeyValueCache,
    Step,
    Style,
    UnsupportedAttentionError,
    running,
    slot_attention,
)

SLOTS = 6
CONTEXT = 160
"""More than two steps of lengths that are rounded up."""
Array = npt.NDArray[np.float64]


@dataclass
class Row:
    """What a row's tokens bring to one layer: (tokens, heads, size) each."""

    query: Array
    key: Array
    value: Array


@dataclass
class Layer:
    """A layer's shapes, and what it wants of attention."""

    key_heads: int
    heads_per_key: int
    size: int
    value_size: int
    style: Style

    def row(self, seed: int, tokens: int) -> Row:
        random = np.random.default_rng(seed)
        heads = self.key_heads * self.heads_per_key
        shapes = ((heads, self.size), (self.key_heads, self.size), (self.key_heads, self.value_size))
        return Row(*(random.normal(size=(tokens, *shape)) for shape in shapes))


def naive(layer: Layer, row: Row) -> Array:
    """Return what a row's tokens see, (tokens, heads, size of a value), by the definition of attention."""
    style, tokens = layer.style, len(row.query)
    scaling = style.scaling if style.scaling is not None else 1 / math.sqrt(layer.size)
    seen = np.zeros((tokens, layer.key_heads * layer.heads_per_key, layer.value_size))
    for token in range(tokens):
        first = 0 if style.window is None else max(0, token + 1 - style.window)
        for head in range(seen.shape[1]):
            key_head = head // layer.heads_per_key
            scores = [float(row.query[token, head] @ row.key[t, key_head]) * scaling for t in range(first, token + 1)]
            if style.softcap is not None:
                scores = [math.tanh(score / style.softcap) * style.softcap for score in scores]
            sink = [] if style.sinks is None else [float(style.sinks[head])]
            total = sum(math.exp(score) for score in scores + sink)
            for score, t in zip(scores, range(first, token + 1), strict=True):
                seen[token, head] += math.exp(score) / total * row.value[t, key_head]
    return seen


def attend(layer: Layer, cache: KeyValueCache, pieces: list[tuple[int, int, Row]]) -> list[Array]:
    """Compute pieces of rows, (slot, position, tokens), in one call, as a model would; return what each sees."""
    batch = Batch(sum(len(row.query) for *_, row in pieces))
    for slot, position, row in pieces:
        batch.add([0] * len(row.query), position, slot, True)
    query, key, value = (
        torch.from_numpy(np.concatenate([getattr(row, name) for *_, row in pieces])).transpose(0, 1)
        for name in ("query", "key", "value")
    )
    found = Step(batch, cache).attend(0, query, key, value, layer.style).numpy()
    ends = np.cumsum([len(row.query) for *_, row in pieces])
    return np.split(found, ends[:-1])


def part(row: Row, start: int, stop: int) -> Row:
    return Row(row.query[start:stop], row.key[start:stop], row.value[start:stop])


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    key_heads, heads_per_key = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3]))
    sinks = torch.linspace(-1, 2, key_heads * heads_per_key, dtype=torch.float64) if draw(st.booleans()) else None
    style = Style(
        scaling=draw(st.sampled_from([None, 0.3])),
        window=draw(st.sampled_from([None, 1, 3, 70])),
        softcap=draw(st.sampled_from([None, 1.5])),
        sinks=sinks,
    )
    return Layer(key_heads, heads_per_key, draw(st.sampled_from([2, 4])), draw(st.sampled_from([2, 4, 5])), style)


@st.composite
def schedules(draw: st.DrawFn) -> list[tuple[int, list[int]]]:
    """Rows in distinct slots: each the sizes of the pieces that it is computed in, the last ones a token each."""
    slots = draw(st.permutations(range(SLOTS)))[: draw(st.integers(1, SLOTS))]
    pieces = st.lists(st.sampled_from([1, 2, 3, 5, 8, 66]), min_size=1, max_size=3)
    return [(slot, draw(pieces) + [1] * draw(st.integers(0, 3))) for slot in slots]


def check(layer: Layer, cache: KeyValueCache, schedule: list[tuple[int, list[int]]], seed: int) -> None:
    """Compute rows piece by piece beside each other, and compare with each row computed naively."""
    rows = [layer.row(seed + i, sum(sizes)) for i, (_, sizes) in enumerate(schedule)]
    found: list[list[Array]] = [[] for _ in rows]
    for turn in range(max(len(sizes) for _, sizes in schedule)):
        here = [i for i, (_, sizes) in enumerate(schedule) if turn < len(sizes)]
        starts = {i: sum(schedule[i][1][:turn]) for i in here}
        pieces = [(schedule[i][0], starts[i], part(rows[i], starts[i], starts[i] + schedule[i][1][turn])) for i in here]
        for i, seen in zip(here, attend(layer, cache, pieces), strict=True):
            found[i].append(seen)
    for row, pieces_seen in zip(rows, found, strict=True):
        np.testing.assert_allclose(np.concatenate(pieces_seen), naive(layer, row), rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(layer=layers(), schedule=schedules())
def test_rows_in_pieces_beside_each_other_see_what_each_sees_alone(
    layer: Layer, schedule: list[tuple[int, list[int]]]
) -> None:
    check(layer, KeyValueCache(SLOTS, CONTEXT + 64), schedule, 0)


@settings(max_examples=20, deadline=None)
@given(layer=layers(), first=schedules(), second=schedules())
def test_rows_see_nothing_of_those_that_had_their_slots_before(
    layer: Layer, first: list[tuple[int, list[int]]], second: list[tuple[int, list[int]]]
) -> None:
    cache = KeyValueCache(SLOTS, CONTEXT + 64)
    check(layer, cache, first, 0)
    check(layer, cache, second, 100)


@settings(max_examples=30, deadline=None)
@given(layer=layers(), tokens=st.integers(2, 80), after=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_a_copied_slot_goes_on_as_its_source_does_and_apart_from_it(
    layer: Layer, tokens: int, after: list[int]
) -> None:
    cache = KeyValueCache(SLOTS, CONTEXT)
    stale, one = layer.row(5, CONTEXT), layer.row(6, tokens + sum(after))
    other = layer.row(7, tokens + sum(after))
    for name in ("query", "key", "value"):
        getattr(other, name)[:tokens] = getattr(one, name)[:tokens]
    attend(layer, cache, [(2, 0, stale)])
    attend(layer, cache, [(0, 0, part(one, 0, tokens))])
    cache.copy(0, 2, tokens)
    at = tokens
    for size in after:
        pieces = [(0, at, part(one, at, at + size)), (2, at, part(other, at, at + size))]
        for row, seen in zip((one, other), attend(layer, cache, pieces), strict=True):
            np.testing.assert_allclose(seen, naive(layer, part(row, 0, at + size))[at:], rtol=1e-5, atol=1e-6)
        at += size


PLAIN = Layer(1, 2, 4, 4, Style())


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("style", [Style(), Style(softcap=5.0), Style(window=3)])
def test_a_slot_is_good_again_after_a_row_of_nan(style: Style, broken: float) -> None:
    layer = replace(PLAIN, style=style)
    cache, bad, good = KeyValueCache(2, CONTEXT), layer.row(0, 40), layer.row(1, 9)
    bad.key[20:], bad.value[20:] = broken, broken
    attend(layer, cache, [(0, 0, bad)])
    cache.clear(0, 40)
    seen = [attend(layer, cache, [(0, at, part(good, at, at + 1))])[0] for at in range(9)]
    np.testing.assert_allclose(np.concatenate(seen), naive(layer, good), rtol=1e-5, atol=1e-6)


def test_a_cache_knows_what_a_token_of_it_takes() -> None:
    cache = KeyValueCache(3, CONTEXT)
    assert cache.bytes_per_token == 0
    for index, layer in enumerate((PLAIN, Layer(2, 1, 4, 6, Style()))):
        row = layer.row(0, 1)
        cache.layer(index, torch.from_numpy(row.key[0, :, None]), torch.from_numpy(row.value[0, :, None]))
    assert cache.bytes_per_token == (4 + 4 + 2 * 4 + 2 * 6) * 8


# --- the function that models call ------------------------------------------------------------------------------------


def call(layer: Layer, cache: KeyValueCache, row: Row, module: Any = None, mask: Any = None, **options: Any) -> Any:
    batch = Batch(len(row.query))
    batch.add([0] * len(row.query), 0, 0, True)
    tensors = (torch.from_numpy(tensor).transpose(0, 1)[None] for tensor in (row.query, row.key, row.value))
    with running(Step(batch, cache)):
        return slot_attention(module or SimpleNamespace(layer_idx=0), *tensors, mask, **options)  # type: ignore[misc]


def test_its_arguments_mean_what_they_mean_to_transformers() -> None:
    row, sinks = PLAIN.row(0, 9), torch.tensor([0.5, -1.0], dtype=torch.float64)
    found, weights = call(
        PLAIN, KeyValueCache(1, CONTEXT), row, scaling=0.2, sliding_window=4, softcap=3.0, s_aux=sinks
    )
    expected = naive(replace(PLAIN, style=Style(0.2, 4, 3.0, sinks)), row)
    assert weights is None
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mask": torch.zeros(1, 1, 3, 3)}, "a mask of its own"),
        ({"module": SimpleNamespace(layer_idx=0, is_causal=False)}, "a mask of its own"),
        ({"is_causal": False}, "a mask of its own"),
        ({"position_bias": torch.zeros(1)}, "takes position_bias"),
    ],
)
def test_what_it_does_not_do_is_refused_by_name(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedAttentionError, match=reason):
        call(PLAIN, KeyValueCache(1, CONTEXT), PLAIN.row(0, 3), **options)


def test_steps_of_several_threads_do_not_meet() -> None:
    rows, found, errors = [PLAIN.row(i, 30) for i in range(4)], {}, []
    barrier = threading.Barrier(len(rows))

    def work(i: int) -> None:
        try:
            cache = KeyValueCache(1, CONTEXT)
            for _ in range(20):
                barrier.wait()
                found[i] = call(PLAIN, cache, rows[i])[0][0].numpy()
        except Exception as error:
            barrier.abort()
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for i, row in enumerate(rows):
        np.testing.assert_allclose(found[i], naive(PLAIN, row), rtol=1e-5, atol=1e-6)

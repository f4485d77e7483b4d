"""Attention over packed rows, each with a key-value cache of its own.

A call's tokens come as one sequence, (1, tokens), whatever rows they belong to. A model of transformers computes all
but attention token by token, so only attention has to know. It comes here through transformers' `AttentionInterface`,
and finds in the running `Step` which token belongs where.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from llmpipe.runners.batching import Batch

NAME = "llmpipe_slots"
"""What this attention is called where transformers says sdpa or eager."""
LENGTH_STEP = 64
"""Cache lengths are rounded up to this, so that shapes repeat."""
MOST_PADDING = 1.25
"""How many times more than needed a CPU may compute to do slots in one call, in which the longest decides for all.

Each call has the threads wait for each other.
"""
TENSORS_WITHOUT_EFFECT = ("position_ids", "cache_position", "position_embeddings")
"""Arguments that models hand through to attention, and that it does not need."""

_running = threading.local()


class UnsupportedAttentionError(Exception):
    """The model asks for something of attention that is not done here."""


@dataclass(frozen=True)
class Style:
    """What a layer wants beyond plain causal attention."""

    scaling: float | None = None
    """Factor of the scores; by default 1 / sqrt(size of a head)."""
    window: int | None = None
    """How many tokens a token sees, itself included."""
    softcap: float | None = None
    """Bound of the scores, approached through tanh (Gemma 2)."""
    sinks: torch.Tensor | None = None
    """A score per head, (heads,), that takes part in the softmax and adds nothing (gpt-oss)."""

    @property
    def is_fused(self) -> bool:
        """Whether torch's fused attention can compute it."""
        return self.softcap is None and self.sinks is None


class KeyValueCache:
    """Keys and values, (slots, heads, context, size of a head) per layer, made when a layer first needs them.

    So each layer's are on the layer's device, in its number format, and of its shape.
    """

    def __init__(self, slots: int, context: int) -> None:
        self._slots = slots
        self._context = context
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values; `key` and `value`, (heads, tokens, size), show what they look like."""
        if index not in self._layers:
            # Zeros: what lies beyond a row's end is weighted with zero, which must not meet a NaN.
            self._layers[index] = (
                key.new_zeros(self._slots, key.shape[0], self._context, key.shape[2]),
                value.new_zeros(self._slots, value.shape[0], self._context, value.shape[2]),
            )
        return self._layers[index]

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` of a slot."""
        for layer in self._layers.values():
            for tensor in layer:
                tensor[target, :, :tokens] = tensor[source, :, :tokens]

    def clear(self, slot: int, tokens: int) -> None:
        """Make the first `tokens` of a slot zeros again: a NaN that a row left behind would spoil the next one."""
        for layer in self._layers.values():
            for tensor in layer:
                tensor[slot, :, :tokens] = 0

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token in one slot takes, all layers together."""
        total: int = sum(tensor.nbytes for layer in self._layers.values() for tensor in layer)
        return total // (self._slots * self._context)


class Step:
    """One call: which of its tokens belongs to which slot, and the masks that follow from it.

    Args:
        batch: The tokens.
        cache: Where their keys and values go.
    """

    def __init__(self, batch: Batch, cache: KeyValueCache) -> None:
        self.cache = cache
        slots, positions = batch.slots[: batch.size], batch.positions[: batch.size]
        starts = [0, *(np.flatnonzero(np.diff(slots)) + 1).tolist()]
        stops = [*starts[1:], batch.size]
        self._segments = [
            (start, stop, int(slots[start]), int(positions[start])) for start, stop in zip(starts, stops, strict=True)
        ]
        self._is_decode = len(starts) == batch.size and bool((slots == np.arange(batch.size)).all())
        self._ends = (positions + 1).tolist()
        self._groups = groups([_round_up(end) for end in self._ends]) if self._is_decode else []
        self._slots = torch.from_numpy(slots.astype(np.int64))
        self._positions = torch.from_numpy(positions.astype(np.int64))
        self._placed: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._masks: dict[Any, torch.Tensor] = {}
        self.styles: dict[int, Style] = {}
        """What each layer asked for."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, style: Style
    ) -> torch.Tensor:
        """Add keys and values to the cache, and let every token see its row.

        Args:
            layer: Number of the layer.
            query: Shape (heads, tokens, size of a head).
            key: Shape (key-value heads, tokens, size of a head).
            value: Shape (key-value heads, tokens, size of a value).
            style: What the layer wants.

        Returns:
            Shape (tokens, heads, size of a value).
        """
        self.styles[layer] = style
        keys, values = self.cache.layer(layer, key, value)
        slots, positions = self._on(keys.device)
        keys[slots, :, positions] = key.transpose(0, 1)
        values[slots, :, positions] = value.transpose(0, 1)
        if self._is_decode:
            return self._attend_one_each(query, keys, values, style)
        parts = [self._attend_segment(query, keys, values, style, *segment) for segment in self._segments]
        return torch.cat(parts)

    def _attend_one_each(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, style: Style
    ) -> torch.Tensor:
        """Attend for one token per slot, slots 0, 1, …; heads that share a key are computed as its rows."""
        heads, tokens, size = query.shape
        rows = query.transpose(0, 1).reshape(tokens, keys.shape[1], -1, size)
        parts = []
        for part in self._groups if keys.device.type == "cpu" else [slice(0, tokens)]:
            length = min(_round_up(max(self._ends[part])), keys.shape[2])
            mask = self._mask(keys.device, part.start, part.stop, length, style.window)[:, None, None]
            parts.append(_attention(rows[part], keys[part, :, :length], values[part, :, :length], mask, style))
        return torch.cat(parts).reshape(tokens, heads, -1)

    def _attend_segment(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        style: Style,
        start: int,
        stop: int,
        slot: int,
        position: int,
    ) -> torch.Tensor:
        """Attend for successive tokens of one slot."""
        end = position + stop - start
        part, key, value = query[None, :, start:stop], keys[slot : slot + 1, :, :end], values[slot : slot + 1, :, :end]
        if position == 0 and style.is_fused and (style.window is None or end <= style.window):
            grouped = part.shape[1] != key.shape[1]
            found = F.scaled_dot_product_attention(
                part, key, value, is_causal=True, scale=style.scaling, enable_gqa=grouped
            )
        else:
            mask = self._mask(keys.device, start, stop, end, style.window)
            # (1, heads, tokens, size) → (1, key-value heads, heads per key · tokens, size)
            folded = part.reshape(1, key.shape[1], -1, part.shape[3])
            found = _attention(folded, key, value, mask.repeat(part.shape[1] // key.shape[1], 1), style)
            found = found.reshape(1, part.shape[1], stop - start, -1)
        return found[0].transpose(0, 1)

    def _mask(self, device: torch.device, start: int, stop: int, length: int, window: int | None) -> torch.Tensor:
        """Return which of the first `length` cached tokens the tokens [start, stop) see: (tokens, length), bool."""
        key = (device, start, stop, length, window)
        if key not in self._masks:
            position = self._on(device)[1][start:stop, None]
            cached = torch.arange(length, device=device)
            mask = cached <= position
            self._masks[key] = mask if window is None else mask & (cached > position - window)
        return self._masks[key]

    def _on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return slots and positions, (tokens,) each, on a device."""
        if device not in self._placed:
            self._placed[device] = (self._slots.to(device), self._positions.to(device))
        return self._placed[device]


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, style: Style
) -> torch.Tensor:
    """Return softmax(query · keyᵀ) · value under a mask.

    Args:
        query: Shape (slots, key-value heads, rows, size); the rows are tokens, heads that share a key, or both.
        key: Shape (slots, key-value heads, length, size).
        value: Shape (slots, key-value heads, length, size of a value).
        mask: Bool, broadcastable to (slots, key-value heads, rows, length).
        style: What the layer wants.
    """
    if style.is_fused:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=style.scaling)
    scaling = query.shape[-1] ** -0.5 if style.scaling is None else style.scaling
    scores = (query @ key.transpose(-1, -2)) * scaling
    if style.softcap is not None:
        scores = torch.tanh(scores / style.softcap) * style.softcap
    scores = scores.masked_fill(~mask, float("-inf")).float()
    if style.sinks is not None:
        # One per head; rows are (heads of this key, tokens), the tokens fastest.
        sinks = style.sinks.float().reshape(key.shape[1], -1, 1)
        sinks = sinks.expand(-1, -1, query.shape[2] // sinks.shape[1]).reshape(1, key.shape[1], -1, 1)
        scores = torch.cat([scores, sinks.expand(len(scores), -1, -1, -1)], dim=-1)
        weights = scores.softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return weights.to(value.dtype) @ value


@contextmanager
def running(step: Step) -> Iterator[None]:
    """Make `step` the one that attention in this thread belongs to."""
    _running.step = step
    try:
        yield
    finally:
        _running.step = None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over the slots of the running step; arguments and result as transformers' attention functions have them.

    Raises:
        UnsupportedAttentionError: the layer wants what is not done here.
    """
    if attention_mask is not None or not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedAttentionError("its attention has a mask of its own")
    for name, other in others.items():
        if isinstance(other, torch.Tensor) and name not in TENSORS_WITHOUT_EFFECT:
            raise UnsupportedAttentionError(f"its attention takes {name}")
    style = Style(scaling, sliding_window, softcap, s_aux)
    layer: Any = module.layer_idx
    return _running.step.attend(layer, query[0], key[0], value[0], style)[None], None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Make no mask: the step knows who sees whom."""


def groups(lengths: Sequence[int]) -> list[slice]:
    """Part slots of these lengths into the neighbours that a CPU computes together."""
    starts, total, longest = [0], 0, 0
    for slot, length in enumerate(lengths):
        total, longest = total + length, max(longest, length)
        if longest * (slot + 1 - starts[-1]) > MOST_PADDING * total:
            starts.append(slot)
            total = longest = length
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(lengths)], strict=True)]


def _round_up(tokens: int) -> int:
    return -(-tokens // LENGTH_STEP) * LENGTH_STEP


AttentionInterface.register(NAME, slot_attention)
AttentionMaskInterface.register(NAME, _no_mask)

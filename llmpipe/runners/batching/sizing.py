"""How large the engine makes itself: from the model, the prompts that wait, the memory that is free, and the cores.

Every choice can be set by hand, and says why it was made. Knows nothing of any backend.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmpipe.config import BackendConfig, BatchingConfig
from llmpipe.runners.batching.lookahead import Sample
from llmpipe.system import machine

log = logging.getLogger(__name__)

CPU_SLOTS, SMALL_MODEL_SLOTS = 16, 32
"""Rows in flight on a CPU: each step reads all weights once, however many rows share it, until arithmetic takes longer.

Measured with 135 and 7 million parameters (benchmarks/results/slots-1-core-xeon.md): of the decode tokens/s of 64 rows,
16 of the larger and 32 of the smaller have 0.80 and 0.97 in llama.cpp, 0.48 and 0.87 in transformers.
"""
SMALL_PARAMETERS = 50_000_000
"""Below it a model is small: between the two that were measured."""
PREFIX_SLOTS = 4
"""Most shared prefixes that are kept: chosen by hand, as few datasets have more than a system prompt or two."""
FEWEST_BATCH_TOKENS = 32
"""Where halving the tokens per call ends: a call has some memory of its own, however few they are. Chosen by hand."""
CONTEXT_STEP = 256
"""Cache sizes are multiples of this: llama.cpp rounds up to it by itself."""
HEADROOM = 1.5
"""How much longer than the longest row looked at a slot is, so that a later row seldom needs a larger one.

Chosen by hand: a larger context waits for all rows in flight to end, a longer slot takes memory that is seldom scarce.
"""
MEMORY_SHARE = 0.6
"""Share of the free memory that the cache may take; the rest is for what calls need, and for other programs."""
UNKNOWN_BYTES = 2**50
"""More than there is: the backend says when there is too little."""


@dataclass(frozen=True)
class Footprint:
    """The figures of a model that decide how much memory it takes in use."""

    parameters: int
    cache_bytes_per_token: int
    gpu_slots: int | None = None
    """Rows in flight on a GPU; None on a CPU."""
    mapped_bytes: int = 0
    """Weights that are mapped from a file: the system counts their memory as free, and they need it all the same."""
    state_bytes: int = 0
    """What a slot takes beside its tokens: the state of recurrent layers."""

    def slot_bytes(self, context: int) -> int:
        """Return what a slot of `context` tokens takes; at least 1."""
        return max(context * self.cache_bytes_per_token + self.state_bytes, 1)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a context."""

    slots: int
    """Rows in flight."""
    prefixes: int
    """Slots beside them that hold shared prefixes."""
    context: int
    """Tokens per slot."""
    batch_tokens: int
    """Most tokens per call; 0 where it takes whole prompts."""
    reasons: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of cache in all."""
        return (self.slots + self.prefixes) * self.context

    def covers(self, other: Sizes) -> bool:
        """Say whether a context of these sizes can do the work of one of the other sizes."""
        return (
            self.slots >= other.slots
            and self.prefixes >= other.prefixes
            and self.context >= other.context
            and self.batch_tokens >= other.batch_tokens
        )

    def within(self, cap: Sizes) -> Sizes:
        """Return sizes with no more slots, and no more tokens per call, than `cap`."""
        within = replace(
            self,
            slots=min(self.slots, cap.slots),
            prefixes=min(self.prefixes, cap.prefixes),
            batch_tokens=min(self.batch_tokens, cap.batch_tokens),
        )
        return within if within == self else within.because(f"{within} instead: memory ran out")

    def halved(self) -> Sizes | None:
        """Return sizes with half the slots and half the tokens per call, or None where there is no less."""
        if self.slots == 1 and not self.prefixes and self.batch_tokens <= FEWEST_BATCH_TOKENS:
            return None
        batch_tokens = max(min(self.batch_tokens, FEWEST_BATCH_TOKENS), self.batch_tokens // 2)
        return replace(self, slots=max(1, self.slots // 2), prefixes=self.prefixes // 2, batch_tokens=batch_tokens)

    def doubled(self) -> Sizes:
        """Return sizes with twice the slots and twice the tokens per call."""
        return replace(
            self, slots=self.slots * 2, prefixes=max(1, self.prefixes * 2), batch_tokens=self.batch_tokens * 2
        )

    def because(self, reason: str) -> Sizes:
        """Return the same sizes with one more reason."""
        return replace(self, reasons=(*self.reasons, reason))

    def __str__(self) -> str:
        """Say how many slots, and, where a call does not take whole prompts, how many tokens per call."""
        return f"{self.slots} slots" + (f" and {self.batch_tokens} tokens per call" if self.batch_tokens else "")


def ideal(config: BatchingConfig, model: Footprint) -> Sizes:
    """Return the sizes that pay, before the rows and the memory are known; of the context, the least."""
    return Sizes(wanted_slots(config, model), prefixes=0, context=CONTEXT_STEP, batch_tokens=config.batch_tokens)


def threads(config: BackendConfig) -> int:
    """Return the CPU threads: the cores that this process may use, unless set by hand."""
    cores = machine.cores()
    if config.threads is None:
        if cores.limit:
            log.info("threads: %d, %s", cores.physical, cores.limit)
        return cores.physical
    if config.threads > cores.at_once:
        why = cores.limit or "there are no more processors"
        log.warning(
            "backend.threads=%d is slower than %d: only %d can run at once (%s), and threads wait for each other",
            *(config.threads, cores.physical, cores.at_once, why),
        )
    return config.threads


def wanted_slots(config: BackendConfig, model: Footprint) -> int:
    """Return how many rows in flight pay, before the dataset and the memory are known."""
    if config.slots != "auto":
        return int(config.slots)
    if model.gpu_slots is not None:
        return model.gpu_slots
    return SMALL_MODEL_SLOTS if model.parameters < SMALL_PARAMETERS else CPU_SLOTS


def most_tokens(model: Footprint) -> int:
    """Return how many tokens one row's cache can have where this process is, whatever else runs there just now."""
    if model.gpu_slots is not None:  # its memory is not known here; the backend says when there is too little
        return 2**31
    memory = machine.memory_bytes() - model.mapped_bytes
    return max(CONTEXT_STEP, int(memory * MEMORY_SHARE / max(model.cache_bytes_per_token, 1)))


def choose(
    config: BatchingConfig,
    model: Footprint,
    waiting: Sequence[Sample],
    limit: int,
    held_tokens: int = 0,
    free_bytes: int | None = None,
    is_live: bool = False,
) -> Sizes:
    """Choose the sizes for the samples that wait.

    Args:
        config: What is set by hand.
        model: The model's footprint.
        waiting: The look ahead; at least one sample.
        limit: Most tokens a row may have.
        held_tokens: Tokens of the cache there is now, which makes room for the new one.
        free_bytes: Memory that is free where the cache goes; by default this process's, and on a GPU without bound.
        is_live: Whether more samples may come at any time.
    """
    reasons = []
    longest = max(sample.need for sample in waiting)
    context = min(_round_up(int(longest * HEADROOM)), _round_up(limit))
    reasons.append(f"{context} tokens per slot: the longest of {len(waiting)} rows looked at may fill {longest}")
    slots = wanted_slots(config, model)
    if config.slots != "auto":
        reasons.append(f"{slots} slots: set by hand")
    elif len(waiting) < slots and not is_live:
        slots = len(waiting)
        reasons.append(f"{slots} slots: no more rows than that wait")
    else:
        place = "GPU" if model.gpu_slots is not None else "CPU"
        reasons.append(f"{slots} slots: as suits {model.parameters / 1e6:.0f} M parameters on a {place}")
    # Equal prompts are one and the same object: of thousands of samples only the few different ones are compared.
    shared = {(id(sample.prompt), end): sample.prompt for sample in waiting for end in (sample.base, sample.shared)}
    groups = {tuple(prompt[:end]) for (_, end), prompt in shared.items() if end}
    prefixes = min(len(groups), PREFIX_SLOTS)
    if groups:
        reasons.append(f"{prefixes} slots for shared prefixes: {len(groups)} found")
    elif slots > 1 and not config.reproducible:
        prefixes = 1
        reasons.append("1 slot for a shared prefix: none was found yet")

    if free_bytes is None:
        free_bytes = UNKNOWN_BYTES if model.gpu_slots is not None else machine.free_memory_bytes()
    free = free_bytes + held_tokens * model.cache_bytes_per_token - model.mapped_bytes
    budget = int(free * (MEMORY_SHARE if config.slots == "auto" else 1))
    if (slots + prefixes) * model.slot_bytes(context) > budget:
        context = min(_round_up(longest), _round_up(limit))
        room = max(1, budget // model.slot_bytes(context))
        prefixes = min(prefixes, 1) if room > 1 else 0
        slots = min(slots, room - prefixes)
        reasons.append(f"{slots} slots and {prefixes} for prefixes instead: {free / 1e6:,.0f} MB of memory are free")
    return Sizes(slots, prefixes, context, config.batch_tokens, tuple(reasons))


def _round_up(tokens: int) -> int:
    return -(-tokens // CONTEXT_STEP) * CONTEXT_STEP

"""Shared beginnings of prompts: computed once into a slot of their own, and copied from there.

Which prompts share what is known from the look ahead: a common beginning (`Sample.base`), and all but the last token of
a prompt of several samples (`Sample.shared`). The slot that was not used for the longest time is taken for a new one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmpipe.runners.batching.executor import Context
from llmpipe.runners.batching.lookahead import Tokens
from llmpipe.runners.batching.sequence import Sequence
from llmpipe.runners.batching.step import Step


@dataclass(eq=False)
class Prefix:
    """A shared prefix in a slot of its own."""

    slot: int
    tokens: Tokens = field(default_factory=list)
    cached: int = 0
    """How many of its tokens are computed; it can be copied once all are."""
    used_at: int = 0
    payer: Sequence | None = None
    """The sequence that it was computed for."""
    free: int = 0
    """How many of its tokens were there before, and cost the payer nothing."""

    def shared_with(self, prompt: Tokens) -> int:
        """Return how many tokens of `prompt` a copy provides: all of the prefix's, or none."""
        length = len(self.tokens)
        return length if self.cached == length and prompt[:length] == self.tokens else 0

    def free_for(self, sequence: Sequence) -> int:
        """Return how many of its tokens cost a sequence nothing."""
        return self.free if sequence is self.payer else len(self.tokens)


class PrefixCache:
    """The prefixes of one context.

    Args:
        context: Has slots for them after those of the rows.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        first = context.sizes.slots
        self._prefixes = [Prefix(first + i) for i in range(context.sizes.prefixes)]
        self._clock = 0

    def provide(self, sequence: Sequence) -> Step | None:
        """Copy what a new sequence shares into its slot; return a step instead while that is still to be computed."""
        sample = sequence.sample
        if not sample.shared or not self._prefixes:
            return None
        # All but the last token, whose logits are needed, may come from a prefix, whoever it was computed for.
        body = sample.prompt[:-1]
        longest = max(self._prefixes, key=lambda prefix: prefix.shared_with(body))
        length = longest.shared_with(body)
        self._clock += 1
        if length:
            longest.used_at = self._clock
        for end in (sample.base, sample.shared):
            if end > length:
                return self._compute(sample.prompt[:end], longest if length else None, sequence)
        self._context.copy(longest.slot, sequence.slot)
        sequence.cached, sequence.copied = length, longest.free_for(sequence)
        return None

    def drop_unfinished(self) -> None:
        """Forget prefixes that are not complete: where computing failed nobody knows what is in the cache."""
        for prefix in self._prefixes:
            if prefix.cached < len(prefix.tokens):
                prefix.tokens, prefix.cached = [], 0

    def _compute(self, tokens: Tokens, base: Prefix | None, payer: Sequence) -> Step:
        """Return the next step towards a prefix of these tokens, of which `base` has the first."""
        prefix = next((prefix for prefix in self._prefixes if prefix.tokens == tokens), None)
        if prefix is None:
            prefix = min(self._prefixes, key=lambda prefix: prefix.used_at)
            if prefix is not base:
                self._context.forget(prefix.slot)
                if base is not None:
                    self._context.copy(base.slot, prefix.slot)
                prefix.cached = base.cached if base is not None else 0
            prefix.payer, prefix.free = payer, 0 if base is None else base.free_for(payer)
            prefix.tokens = tokens
        batch = self._context.batch
        batch.clear()
        count = batch.add(tokens[prefix.cached :], prefix.cached, prefix.slot, output_last=False)
        return Step([(prefix, count)], [])

"""How far a run is, and how long it will take: counted in tokens as they come, not in answers that have ended.

Rows left are worth the tokens that rows have, which the first answers to end do not tell: they are the short ones. So
one that is under way counts too, as one that is longer than it is by now. A row costs time for its prompt and for each
token; which share is whose shows in how the two come along, for prompts are computed in calls of their own.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llmpipe.records import Completion
from llmpipe.stopwatch import Stopwatch

RECENT_S = 10.0
"""The rate is that of the last seconds; prompts and answers take turns within fewer."""
REMEMBERED_S = 30.0
"""Within so long, or a quarter of the run if that is longer, a step's weight in what a row costs falls to 1/e."""


class Outlook(NamedTuple):
    """What the next seconds may be told from the last ones."""

    tokens_per_s: float
    """Generated within the last `RECENT_S`."""
    left_s: float | None
    """Until all is done; None where nothing speaks for any time yet."""
    answers: float
    """What is done, answers under way counted by the share of them that is likely to be there."""


class Progress:
    """How far one attempt at a run is.

    Args:
        stopwatch: Times the attempt's answers, and knows those under way.
        done: Answers that earlier attempts have got.
        expected: How many there will be.
        most_tokens: How many an answer may have.
    """

    def __init__(self, stopwatch: Stopwatch, done: int, expected: int, most_tokens: int) -> None:
        self._stopwatch, self._most_tokens = stopwatch, most_tokens
        self.done = done
        """Answers so far, those of earlier attempts included."""
        self.expected = expected
        """Answers there will be, as far as is known: a row may ask for more or fewer, and one that fails has one."""
        self._lengths: Counter[int] = Counter()
        self._recent = deque([(time.monotonic(), 0)])
        self._costs = Costs(time.monotonic())

    def note(self, completion: Completion) -> None:
        """Count what an answer has generated."""
        if completion.completion_tokens is not None:
            self._lengths[completion.completion_tokens] += 1

    @property
    def tokens(self) -> int:
        """Generated since the attempt began, by answers under way too; of these, about."""
        return sum(length * rows for length, rows in self._lengths.items()) + sum(self._stopwatch.under_way())

    def outlook(self) -> Outlook:
        """Look ahead; to be called about as often as what it says is to change."""
        now, tokens, under_way = time.monotonic(), self.tokens, self._stopwatch.under_way()
        while len(self._recent) > 1 and self._recent[1][0] < now - RECENT_S:
            self._recent.popleft()
        since, had = self._recent[0]
        self._recent.append((now, tokens))
        begun = self._lengths.total() + len(under_way)
        self._costs.add(now, begun, tokens - begun)
        rate = max(0.0, (tokens - had) / (now - since)) if now > since else 0.0
        waiting = self.expected - self.done - len(under_way)
        rest = expected_rest(self._lengths, [*under_way, 0], self._most_tokens)
        answers = self.done + sum(n / max(n + more, 1) for n, more in zip(under_way, rest, strict=False))
        further = waiting * max(0.0, rest[-1] - 1) + sum(rest[:-1])
        row_s, token_s = self._costs.each()
        if row_s is None or (token_s is None and further >= 1):
            return Outlook(rate, None, answers)
        return Outlook(rate, waiting * row_s + further * (token_s or 0.0), answers)


Watch = Callable[[Progress], None]
"""Called at each step of a run and for each answer, with the same object: whoever watches decides when to look."""


class Costs:
    """What beginning a row costs, its prompt and its first token, and what each further token does.

    They are fitted by least squares to the steps of the last time, and scaled to explain all of it.

    Args:
        now: When the first step begins.
    """

    def __init__(self, now: float) -> None:
        self._began = self._last = now
        self._counts = np.zeros(2)
        self._products, self._shares, self._sums = np.zeros((2, 2)), np.zeros(2), np.zeros(3)

    def add(self, now: float, rows: int, further_tokens: int) -> None:
        """Note how many rows were begun, and how many further tokens were generated, by now."""
        counts = np.array([rows, further_tokens], dtype=float)
        step, took_s = np.maximum(counts - self._counts, 0.0), now - self._last
        if not step.any():  # it goes on
            return
        kept = math.exp(-took_s / max(REMEMBERED_S, (now - self._began) / 4))
        self._products = kept * self._products + np.outer(step, step)
        self._shares = kept * self._shares + took_s * step
        self._sums = kept * self._sums + [*step, took_s]
        self._counts, self._last = counts, now

    def each(self) -> tuple[float | None, float | None]:
        """Return the seconds for a row and for a token; None for what there was none of yet."""
        seen, took_s = self._sums[:2] > 0, self._sums[2]
        cost = np.maximum(np.linalg.lstsq(self._products, self._shares, rcond=1e-6)[0], 0.0)
        explained = cost @ self._sums[:2]
        if explained <= 0:
            return None, None
        row_s, token_s = cost * took_s / explained
        return (float(row_s) if seen[0] else None), (float(token_s) if seen[1] else None)


def expected_rest(ended: Mapping[int, int], under_way: Sequence[int], most: int) -> list[float]:
    """Return how many tokens are still to come of each answer under way.

    The lengths' distribution is estimated as by Kaplan and Meier (1958), where an answer under way counts as one that
    has at least its length by now. Beyond the longest, answers end as often as they did before.

    Args:
        ended: How many answers ended with so many tokens.
        under_way: Tokens of each that has not ended.
        most: More none can have.
    """
    lengths, rows = np.array([*ended], dtype=int), np.array([*ended.values()], dtype=float)
    longest = max([*ended, *under_way])
    ends = np.bincount(lengths, rows, longest + 1)
    at_risk = (ends + np.bincount(under_way, minlength=longest + 1))[::-1].cumsum()[::-1]
    longer = np.cumprod(1 - ends / at_risk)  # the share of answers that are longer than so many tokens
    tokens = float(lengths @ rows) + sum(under_way)
    beyond = longer[-1] * max(0.0, min(most - longest, tokens / rows.sum() if len(rows) else math.inf))
    to_come = np.append(longer[:-1][::-1].cumsum()[::-1], 0.0) + beyond
    at_least = np.concatenate([[1.0], longer[:-1]])
    return [float(to_come[n] / at_least[n]) for n in under_way]

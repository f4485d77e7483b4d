"""`SamplingConfig` → tokens, for all rows of a step at once, each from a random stream of its own.

Rows with equal options go together through the same operations, on the device that the logits are on; all that comes
back to the host are the tokens. No operation mixes rows, so what a row gets does not depend on the rows beside it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from random import Random

import torch

from llmpipe.config import SamplingConfig

CHANGES = ("logit_bias", "repetition_penalty", "presence_penalty", "frequency_penalty")
"""Options that change the scores of tokens; greedy rows honour these alone."""
DRAWS = ("temperature", "top_k", "top_p", "min_p", "typical_p")
"""Options of the distribution that a token is drawn from."""
OPTIONS = frozenset({*CHANGES, *DRAWS})
FEW = 256
"""Tokens that are ranked first: seldom are more likely enough to count, and to rank a vocabulary takes its time."""


class Sampler:
    """One completion: its options, its random stream, and the tokens that its penalties look at.

    Args:
        sampling: The options.
        seed: Seed of the completion's random stream.
        prompt: The prompt's tokens; the repetition penalty counts them, the other penalties do not.
    """

    def __init__(self, sampling: SamplingConfig, seed: int, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self.options = _options(sampling)
        """Equal for samplers whose rows can go through the same operations."""
        self.uniform = 0.0
        """The number in [0, 1) that decides the next token; the same until there is one."""
        self.seen: torch.Tensor | None = None
        """Which tokens prompt and completion have, (vocabulary,), bool, where the repetition penalty asks for it."""
        self.counts: torch.Tensor | None = None
        """How often the completion has each token, (vocabulary,), float32, where the other penalties ask for it."""
        self._prompt = list(prompt) if sampling.repetition_penalty != 1 else []
        # Not of the device, so that a seed means the same everywhere.
        self._random = None if sampling.is_greedy else Random(seed)
        self.advance()

    def advance(self) -> None:
        """Go on to the next token."""
        if self._random is not None:
            self.uniform = self._random.random()

    def prepare(self, scores: torch.Tensor) -> None:
        """Make what the penalties need, where the scores are, unless it is there."""
        s = self.sampling
        if s.repetition_penalty != 1 and self.seen is None:
            self.seen = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
            self.seen[torch.tensor(self._prompt, dtype=torch.long, device=scores.device)] = True
        if (s.presence_penalty or s.frequency_penalty) and self.counts is None:
            self.counts = torch.zeros(scores.shape[1], device=scores.device)

    def close(self) -> None:
        """Free the tensors."""
        self.seen = self.counts = None


def _options(s: SamplingConfig) -> Hashable:
    """Return the values of all options that the choice of a token depends on."""
    values = (getattr(s, name) for name in (CHANGES if s.is_greedy else CHANGES + DRAWS))
    return tuple(tuple(value.items()) if isinstance(value, dict) else value for value in values)


@torch.inference_mode()  # type: ignore[untyped-decorator]
def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Choose a token for each row.

    A sampler goes on to its next token once all rows have theirs: if memory runs out before, it can be asked again.

    Args:
        logits: Shape (rows, vocabulary), float32, on any device; not changed.
        samplers: One for each row.

    Returns:
        A token for each row, or -1 where its logits are no numbers, as after an overflow in the model or in a penalty.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, sampler in enumerate(samplers):
        groups[sampler.options].append(i)
    tokens = torch.empty(len(samplers), dtype=torch.long, device=logits.device)
    states = []
    for rows in groups.values():
        group = [samplers[i] for i in rows]
        index = torch.tensor(rows, device=logits.device) if len(groups) > 1 else slice(None)
        tokens[index], seen, counts = _choose_alike(logits[index], group)
        states.append((group, seen, counts))
    found: list[int] = tokens.tolist()
    for group, seen, counts in states:
        for i, sampler in enumerate(group):
            sampler.seen, sampler.counts = (None if state is None else state[i] for state in (seen, counts))
            sampler.advance()
    return found


def _choose_alike(
    scores: torch.Tensor, samplers: Sequence[Sampler]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Choose a token for each of the rows of equal options.

    Returns:
        The tokens, and what `seen` and `counts` of all samplers are then, (rows, vocabulary).
    """
    s = samplers[0].sampling
    for sampler in samplers:
        sampler.prepare(scores)
    seen, counts = (
        None if getattr(samplers[0], name) is None else torch.stack([getattr(sampler, name) for sampler in samplers])
        for name in ("seen", "counts")
    )
    if s.logit_bias:
        ids, bias = list(s.logit_bias), list(s.logit_bias.values())
        scores = scores.index_add(1, _like(scores, ids, torch.long), _like(scores, [bias]).expand(len(scores), -1))
    if seen is not None:
        penalty = s.repetition_penalty
        scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
    if counts is not None:
        scores = scores - (s.presence_penalty * (counts > 0) + s.frequency_penalty * counts)
    if s.is_greedy:
        tokens = scores.argmax(-1)
    else:
        exact = _exact(scores)
        uniforms = _like(scores, [[sampler.uniform] for sampler in samplers], exact)
        tokens = draw(scores, s, uniforms.clamp(max=1 - torch.finfo(exact).eps / 2))  # short of 1 when rounded, too
    if seen is not None:
        seen.scatter_(1, tokens[:, None], True)
    if counts is not None:
        counts.scatter_add_(1, tokens[:, None], torch.ones_like(tokens, dtype=counts.dtype)[:, None])
    # The largest is NaN where any is.
    return tokens.masked_fill(~scores.amax(-1).isfinite(), -1), seen, counts


def draw(scores: torch.Tensor, sampling: SamplingConfig, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw a token for each row from what temperature, top_k, top_p, min_p and typical_p leave.

    Args:
        scores: Shape (rows, vocabulary).
        sampling: The options of all rows.
        uniforms: Where in its distribution each row's token is, in [0, 1); shape (rows, 1).

    Returns:
        Shape (rows,).
    """
    scores = scores / sampling.temperature
    weights, ids, short = candidates(scores, sampling, FEW)
    tokens = _pick(weights, ids, uniforms)
    if short is not None and bool(short.any()):
        rows = short.nonzero()[:, 0]
        weights, ids, _ = candidates(scores[rows], sampling, scores.shape[1])
        tokens[rows] = _pick(weights, ids, uniforms[rows])
    return tokens


def candidates(
    scores: torch.Tensor, s: SamplingConfig, most: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the tokens that can be drawn, and how likely each is.

    Args:
        scores: Shape (rows, vocabulary), divided by the temperature.
        s: The other options.
        most: Tokens to rank for `top_p` and `typical_p`.

    Returns:
        Weights, (rows, candidates), that need not sum to one; the candidates' ids, of the same shape, or None where
        all tokens are candidates, in order; and for which rows `most` is too few, (rows,), or None where it cannot be.
    """
    ids: torch.Tensor | None = None
    short: torch.Tensor | None = None
    if s.top_k:
        scores, ids = scores.topk(min(s.top_k, scores.shape[1]))
    weights = scores.softmax(-1)
    if s.top_p < 1:
        if ids is None:
            ids = scores.topk(min(most, scores.shape[1])).indices
            weights = weights.gather(1, ids)
        weights, short = _first(weights, s.top_p, short)
    if s.min_p > 0:
        weights = weights.masked_fill(weights < s.min_p * weights.amax(-1, keepdim=True), 0)
    if s.typical_p < 1:
        weights = weights / weights.sum(-1, keepdim=True)
        distance = (weights.log() + torch.special.entr(weights).sum(-1, keepdim=True)).abs()
        order = distance.topk(min(most, weights.shape[1]), largest=False).indices
        weights, short = _first(weights.gather(1, order), s.typical_p, short)
        ids = order if ids is None else ids.gather(1, order)
    return weights, ids, short


def _first(weights: torch.Tensor, mass: float, short: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep each row's first candidates up to a probability of `mass`; say which rows have too few candidates for it."""
    sums = weights.cumsum(-1)
    few = sums[:, -1] < mass
    return weights.masked_fill(sums - weights >= mass, 0), few if short is None else short | few


def _pick(weights: torch.Tensor, ids: torch.Tensor | None, uniforms: torch.Tensor) -> torch.Tensor:
    """Return the candidates in which the rows' numbers fall, (rows,)."""
    sums = weights.cumsum(-1, dtype=uniforms.dtype)
    at = torch.searchsorted(sums, uniforms * sums[:, -1:], right=True)
    at.clamp_(max=weights.shape[1] - 1)  # of a row of NaN
    return (at if ids is None else ids.gather(1, at))[:, 0]


def _exact(scores: torch.Tensor) -> torch.dtype:
    """Return a number format in which the unlikely tokens of a large vocabulary add up, where the device has one."""
    return torch.float32 if scores.device.type == "mps" else torch.float64


def _like(scores: torch.Tensor, values: Sequence[object], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=scores.device)

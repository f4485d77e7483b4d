"""The samples that wait for a slot: pulled a little ahead, ordered longest first, grouped by what their prompts share.

Looking ahead is what lets the engine size itself, keep the tail of a run short, and compute a common system prompt or
few-shot block once. How far it looks is bounded, so memory does not grow with the dataset. Knows no
backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from llmpipe.records import Chunk, Request, error_chunk, error_chunks

MIN_SHARED_TOKENS = 32
"""Prefixes shorter than this are computed again: copying a slot's cache is not free."""

MAX_GROUPED = 256
"""Different prompts of a block that are searched for common prefixes."""

Tokens = list[int]
Encode = Callable[[Request], tuple[Tokens, int]]
"""Request → the prompt's tokens and how many were cut off on the left; a ValueError makes an error row."""


@dataclass(slots=True, eq=False)
class Sample:
    """One sample that waits."""

    request: Request
    number: int
    prompt: Tokens
    truncated: int
    need: int
    """Tokens of cache it can come to fill: its prompt and all it may generate."""
    shared: int = 0
    """Leading tokens it has in common with others that wait; 0 where sharing does not pay."""
    base: int = 0
    """How many of them it shares with samples of other prompts, too."""

    def error_chunk(self, reason: str) -> Chunk:
        """Return the chunk that ends it: it cannot be run, or not to its end."""
        return error_chunk(self.request.id, reason, self.number)


class LookAhead:
    """Pulls requests in blocks and hands out their samples in the order in which they are best run.

    Args:
        requests: Where samples come from; None among them says that there is none just now.
        encode: Tokenises a request.
        limit: Most tokens of prompt and completion that a sample may have.
        share: Whether prompts are searched for common prefixes.
    """

    def __init__(self, requests: Iterable[Request | None], encode: Encode, limit: int, share: bool) -> None:
        self._source = iter(requests)
        self._encode = encode
        self._limit = limit
        self._share = share
        self.is_exhausted = False
        """Whether all requests were pulled."""
        self.is_live = False
        """Whether requests come at any time."""
        self.waiting: list[Sample] = []
        self._block: dict[tuple[int, ...], list[Sample]] = {}
        """Samples that were pulled and are not ordered yet, by their prompts."""
        self._pulled = 0
        """How many those are."""

    def fill(self, count: int) -> list[Chunk]:
        """Pull until `count` samples wait; or return the chunks that end a request which cannot be run.

        The next call goes on where that one was pulled: whoever drives the stream hears of it first, and may pull no
        more.
        """
        while len(self.waiting) + self._pulled < count and not self.is_exhausted:
            try:
                request = next(self._source)
            except StopIteration:
                self.is_exhausted = True
                break
            if request is None:
                self.is_live = True
                break
            try:
                prompt, truncated = self._encode(request)
            except (ValueError, RecursionError) as error:
                return error_chunks(request, str(error))
            need = min(len(prompt) + request.sampling.max_tokens, self._limit)
            equals = self._block.setdefault(tuple(prompt), [])
            prompt = equals[0].prompt if equals else prompt
            equals += [Sample(request, number, prompt, truncated, need) for number in request.samples]
            self._pulled += len(request.samples)
        if self._block:  # taken from the end: nobody waits for those that came later
            self.waiting = self._order(list(self._block.values())) + self.waiting
            self._block, self._pulled = {}, 0
        return []

    def next(self, room: int) -> Sample | None:
        """Take the sample to run next, of those that need no more than `room` tokens; None if none does.

        Of a live source nobody overtakes one that needs more: there might always be another one.
        """
        for i in range(len(self.waiting) - 1, -1, -1):
            if self.waiting[i].need <= room:
                return self.waiting.pop(i)
            if self.is_live:
                break
        return None

    def take_longest(self) -> list[Sample]:
        """Take the samples that need the most tokens."""
        most = max(sample.need for sample in self.waiting)
        longest = [sample for sample in self.waiting if sample.need == most]
        self.waiting = [sample for sample in self.waiting if sample.need < most]
        return longest

    def take_requests(self, ids: set[int]) -> list[Sample]:
        """Take the samples of some requests."""
        taken = [sample for sample in self.waiting if sample.request.id in ids]
        self.waiting = [sample for sample in self.waiting if sample.request.id not in ids]
        return taken

    def _order(self, block: list[list[Sample]]) -> list[Sample]:
        """Return samples, given prompt by prompt, as they are best run; the next to run stands at the end.

        Groups of prompts with a common prefix stay together, and so do the samples of a prompt; of groups, prompts and
        samples those that need the most tokens come first.
        """
        groups = shared_prefixes([samples[0].prompt for samples in block[:MAX_GROUPED]]) if self._share else []
        grouped = {i for members, _ in groups for i in members}
        groups += [([i], 0) for i in range(len(block)) if i not in grouped]
        needs = [max(sample.need for sample in samples) for samples in block]
        order: list[Sample] = []
        for members, length in sorted(groups, key=lambda group: max(needs[i] for i in group[0])):
            for i in sorted(members, key=needs.__getitem__):
                samples = sorted(block[i], key=lambda sample: sample.need)
                whole = self._share and _whole_pays(samples, length)
                for sample in samples:
                    sample.base, sample.shared = length, len(sample.prompt) - 1 if whole else length
                order += samples
        return order


def _whole_pays(samples: Sequence[Sample], base: int) -> bool:
    """Say whether samples of one prompt should share all of it but its last token, and not only the first `base`."""
    whole = len(samples[0].prompt) - 1
    return whole >= MIN_SHARED_TOKENS and (whole - base) * (len(samples) - 1) >= MIN_SHARED_TOKENS


Group = tuple[list[int], int]
"""Indices of prompts, and the length of the prefix they share."""


def shared_prefixes(prompts: Sequence[Tokens]) -> list[Group]:
    """Group prompts so that computing each group's common prefix once saves the most tokens.

    Prompts that share a prefix stand beside each other once sorted. A run of neighbours either shares its shortest
    common prefix as a whole, or is split where that is shortest, and each part shares more; whichever saves more.

    Returns:
        Groups of at least two prompts that share at least `MIN_SHARED_TOKENS`, and never all of a prompt, whose last
        token has to be computed for its logits.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    common = [_common(prompts[a], prompts[b]) for a, b in pairwise(order)]
    groups: list[Group] = []
    start = 0
    for end in range(len(order)):
        if end == len(common) or common[end] < MIN_SHARED_TOKENS:
            groups += _best_groups(common, start, end)
            start = end + 1
    return [([order[i] for i in members], length) for members, length in groups]


def _best_groups(common: Sequence[int], first: int, last: int) -> list[Group]:
    """Return the groups of the sorted prompts in [first, last]; neighbours i and i + 1 share `common[i]` tokens."""
    if first == last:
        return []
    shortest = min(common[first:last])
    whole = [(list(range(first, last + 1)), shortest)]
    if shortest == max(common[first:last]):
        return whole
    parts: list[Group] = []
    start = first
    for i in range(first, last + 1):
        if i == last or common[i] == shortest:
            parts += _best_groups(common, start, i)
            start = i + 1
    grouped = {i for members, _ in parts for i in members}
    rest = [i for i in range(first, last + 1) if i not in grouped]
    if len(rest) > 1:
        parts.append((rest, shortest))
    return max(whole, parts, key=_saved)


def _saved(groups: Sequence[Group]) -> int:
    return sum(length * (len(members) - 1) for members, length in groups)


def _common(one: Tokens, other: Tokens) -> int:
    """Return how many leading tokens two prompts share, short of all of either."""
    limit = min(len(one), len(other)) - 1
    if one[:limit] == other[:limit]:
        return limit
    low, high = 0, limit
    while low < high:  # the longest equal prefix, by bisection on C-speed comparisons
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low

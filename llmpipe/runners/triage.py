"""Which rows go into a child process next, and what becomes of those that were in it when it died.

The rows that a child held when it died are suspects: they are run apart in groups, the groups that fail again in
smaller ones, until the row that does it is alone. One that does it `ALONE_ATTEMPTS` times alone, or hangs there, is
given up. How often a suspect was run alone is noted before each time, so that a row that takes this process along is
not tried for ever.

A kill from outside is no fault of a row's. Those that were in the child are run apart all the same, for they may have
asked for too much of the machine together; one that was alone is put off to the end.

Knows nothing of how processes are started or talked to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from math import isqrt

from llmpipe.exceptions import LLMError, LLMInferenceError
from llmpipe.records import Chunk, Request, error_chunks
from llmpipe.runners.deaths import ChildDied, ChildHung, ChildKilled, ChildStarved

ALONE_ATTEMPTS = 3
"""How often a suspect is run alone, resumptions counted."""
LOSSES = 5
"""How often the child may be lost with no row to blame, and none answered meanwhile, before that ends the stream."""
PAUSE_S = 0.5
"""How long the child's next start waits after the first such loss; twice as long after each further one."""
NO_ROW = "something other than a row"


class Losses:
    """How often the child was lost with no row to blame since the last answer, and how long its next start waits."""

    def __init__(self) -> None:
        self._count = 0
        self.pause_s = 0.0

    def add(self, what: str, death: ChildDied, error: type[LLMError] = LLMInferenceError) -> None:
        """Count a loss.

        Raises:
            error: there are too many of them.
        """
        self._count += 1
        if self._count == LOSSES:
            raise error(f"{what} {death}, and the backend was lost {LOSSES} times in a row") from death
        self.pause_longer()

    def pause_longer(self) -> None:
        """Let the next start wait, longer than the one before."""
        self.pause_s = min(2 * self.pause_s or PAUSE_S, PAUSE_S * 2**LOSSES)

    def forget(self) -> None:
        """Begin anew: all is well."""
        self._count, self.pause_s = 0, 0.0


class Cohort:
    """Rows that are run together in a child: those that it has not pulled, that it holds, and that it has answered.

    Args:
        rows: What the child pulls from.
        alone: The row, where it is a suspect that is run by itself.
    """

    def __init__(self, rows: Iterator[Request | None], alone: Request | None = None) -> None:
        self.rows = rows
        self.alone = alone
        self._open: dict[int, tuple[Request, set[int]]] = {}
        """The requests that the child holds, and which of their samples have no answer."""
        self._begun: set[tuple[int, int]] = set()
        """Samples that have yielded text and have not ended."""
        self.answered: list[int] = []
        """Ids of the requests that are done."""

    def pull(self, count: int) -> list[Request] | None:
        """Return the next rows, at most so many, which the child holds then; None where there are none just now."""
        pulled: list[Request] = []
        for request in islice(self.rows, count):
            if request is None:
                return pulled or None
            self._open[request.id] = request, set(request.samples)
            pulled.append(request)
        return pulled

    def take(self, chunk: Chunk) -> None:
        """Note what comes back; what was not asked for is left to whoever counts answers."""
        key = chunk.request_id, chunk.sample
        if chunk.finish_reason is None:
            if chunk.text:
                self._begun.add(key)
            return
        self._begun.discard(key)
        if chunk.request_id in self._open:
            samples = self._open[chunk.request_id][1]
            samples.discard(chunk.sample)
            if not samples:
                del self._open[chunk.request_id]
                self.answered.append(chunk.request_id)

    def restarts(self) -> list[Chunk]:
        """Return chunks that take back the text that is out."""
        return [Chunk(*key, restarts=True) for key in sorted(self._begun)]

    def held(self) -> list[Request]:
        """Return requests for what the child has not answered."""
        return [replace(request, samples=tuple(sorted(samples))) for request, samples in self._open.values()]


class Triage:
    """Divides the rows of one stream into cohorts, and judges them when their child dies.

    Args:
        requests: The rows; None among them where there are none just now.
        suspects: How often each suspect of an earlier run was run alone, by its id.
        note: Makes the suspects durable.
        losses: Told of deaths that no row is to blame for.
    """

    def __init__(
        self,
        requests: Iterable[Request | None],
        suspects: Mapping[int, int],
        note: Callable[[dict[int, int]], None],
        losses: Losses,
    ) -> None:
        self._suspects = dict(suspects)
        self._note = note
        self._losses = losses
        self._source = self._unsuspected(requests)
        self._exhausted = False
        """Whether a child has come to the end of the source, rather than died."""
        self._apart: deque[list[Request]] = deque()
        """Groups to be run now."""
        self._last: deque[list[Request]] = deque()
        """Suspects to be run, each alone, when all others are done."""

    def _unsuspected(self, requests: Iterable[Request | None]) -> Iterator[Request | None]:
        """Yield `requests`, but put suspects of an earlier run off."""
        for request in requests:
            if request is not None and request.id in self._suspects:
                self._last.append([request])
            else:
                yield request

    def next(self) -> Cohort | None:
        """Return the next cohort; None when all rows are done."""
        if not self._apart and not self._exhausted:
            return Cohort(self._source)
        groups = self._apart or self._last
        if not groups:
            return None
        group = groups.popleft()
        return Cohort(iter(group), alone=group[0] if len(group) == 1 else None)

    def given_up(self, cohort: Cohort) -> list[Chunk]:
        """Return the chunks that end a row which was run alone too often; none where the cohort may run."""
        row = cohort.alone
        if row is None or self._suspects[row.id] < ALONE_ATTEMPTS:
            return []
        return error_chunks(row, f"ended its run {ALONE_ATTEMPTS} times, without an answer")

    def begin(self, cohort: Cohort) -> None:
        """Note that a cohort is about to run: durably where it is a row alone, before that goes to the child."""
        self._count(cohort, 1)

    def withdraw(self, cohort: Cohort) -> None:
        """Take back what `begin` has noted, because no row is to blame for the end of this cohort's run."""
        self._count(cohort, -1)

    def _count(self, cohort: Cohort, by: int) -> None:
        if cohort.alone is not None:
            self._suspects[cohort.alone.id] += by
            self._note(self._suspects)

    def finish(self, cohort: Cohort) -> None:
        """Note that the child has come to the end of a cohort."""
        self._exhausted = self._exhausted or cohort.rows is self._source

    def acquit(self, cohort: Cohort) -> None:
        """Suspect no longer the rows of a cohort that were answered, whatever became of the others."""
        for answered in cohort.answered:
            self._suspects.pop(answered, None)

    def blame(self, cohort: Cohort, death: ChildDied) -> list[Chunk]:
        """Decide which rows of a cohort run again after their child died; return the chunks that end the others.

        Raises:
            LLMInferenceError: the child was lost too often, with no row to blame.
        """
        held, alone = cohort.held(), cohort.alone
        innocent = not held or isinstance(death, ChildKilled)
        if innocent:
            self._losses.add("a row" if held else NO_ROW, death)
            self.withdraw(cohort)
        elif alone is not None and (isinstance(death, ChildHung) or self._suspects[alone.id] >= ALONE_ATTEMPTS):
            self._losses.forget()
            return error_chunks(held[0], str(death))
        elif isinstance(death, ChildStarved):
            self._losses.pause_longer()
        self._suspects.update({row.id: self._suspects.get(row.id, 0) for row in held})
        self._note(self._suspects)
        if innocent and held and alone is not None:
            self._last.append(held)
            return []
        size = max(isqrt(len(held)), 1)  # few restarts, and neighbours still share the model
        groups = [held[i : i + size] for i in range(0, len(held), size)]
        if cohort.rows is not self._source and (left := [row for row in cohort.rows if row is not None]):
            groups.append(left)
        self._apart.extendleft(reversed(groups))
        return []

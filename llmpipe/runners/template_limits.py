"""A Jinja sandbox in which a template can neither run for ever nor fill the memory.

A sandbox keeps a template from what it must not touch; this one also keeps it from taking too much. Between any two
statements the time and memory spent so far are looked at; single operations that could make something huge of
something small are refused by the sizes that go in.
"""

from __future__ import annotations

import functools
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

RENDER_S = 2.0
"""Seconds of the processor that rendering one chat may take; usual is a fraction of a millisecond."""
MOST_CHARACTERS = 64 * 2**20
MOST_BYTES = 512 * 2**20
"""How much the memory of the process may grow meanwhile."""
MOST_NUMBER = 10**6
"""The largest width or count that a method or filter is given."""
_WIDE = re.compile(r"\d{7}|\*")


class TickingCode(CodeGenerator):
    """Compiles a look at the limits into the code before each statement."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        """Write the code of statements that follow each other."""
        for node in nodes:
            self.writeline("environment.tick()")
            super().blockvisit([node], frame)
        super().blockvisit([], frame)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The immutable sandbox, with limits."""

    code_generator_class = TickingCode
    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._until = threading.local()
        for name, function in list(self.filters.items()):
            self.bound(name, function)

    def bound(self, name: str, function: Callable[..., Any]) -> None:
        """Make `function` a filter whose arguments are looked at first."""

        @functools.wraps(function)
        def looked_at(*args: Any, **options: Any) -> Any:
            _refuse_huge(name, args, options)
            return function(*args, **options)

        self.filters[name] = looked_at

    @contextmanager
    def limits(self) -> Iterator[None]:
        """Start to count time and memory, for this thread."""
        self._until.limits = time.thread_time() + RENDER_S, _peak_bytes() + MOST_BYTES
        yield

    def tick(self) -> None:
        """Refuse to go on beyond the limits.

        Raises:
            SecurityError: says which.
        """
        seconds, most_bytes = self._until.limits
        if time.thread_time() > seconds:
            raise SecurityError(f"it takes more than {RENDER_S:g} s")
        if _peak_bytes() > most_bytes:
            raise SecurityError(f"it takes more than {MOST_BYTES / 1e6:,.0f} MB of memory")

    def at_most(self, pieces: Iterable[str]) -> Iterator[str]:
        """Yield `pieces`, which may have `MOST_CHARACTERS` together.

        Raises:
            SecurityError: they have more.
        """
        length = 0
        for piece in pieces:
            length += len(piece)
            if length > MOST_CHARACTERS:
                raise SecurityError(f"it makes more than {MOST_CHARACTERS:,} characters")
            yield piece

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute one of the operators that can make much of little."""
        if operator == "**" and not (abs(left) <= MOST_NUMBER and abs(right) <= 64):
            raise SecurityError("it computes a huge power")
        if operator == "*" and max(_size(left), 1) * max(_size(right), 1) > MOST_CHARACTERS:
            raise SecurityError("it computes a huge product")
        if operator == "%" and isinstance(left, str):
            _refuse_huge("format", (left,), {})
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, *args: Any, **options: Any) -> Any:
        """Call a method or function after a look at what goes in."""
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # the sandbox wraps str.format
        if isinstance(owner, (str, bytes, int)):
            _refuse_huge(function.__name__, (owner, *args), options)
        elif getattr(function, "__name__", "") == "strftime_now":
            _refuse_huge("format", args, options)
        return super().call(context, function, *args, **options)


def _refuse_huge(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Refuse arguments from which a method or filter would make something huge."""
    values = [*args, *options.values()]
    if any(isinstance(value, int) and abs(value) > MOST_NUMBER for value in values[1:]):
        raise SecurityError(f"it asks {name} for a huge number")
    if name in ("format", "format_map", "strftime") and any(isinstance(v, str) and _WIDE.search(v) for v in values[:1]):
        raise SecurityError("it asks for a huge width")
    if name in ("replace", "join", "indent", "expandtabs", "translate", "wordwrap"):
        sizes = [_size(value) for value in values if isinstance(value, (str, bytes, list, tuple))]
        sizes += [value for value in values if isinstance(value, int)]
        product = functools.reduce(lambda one, other: one * max(other, 1), sorted(sizes)[-2:], 1)
        if product > 16 * MOST_CHARACTERS:
            raise SecurityError(f"it asks {name} for a huge text")


def _size(value: Any) -> int:
    """Return how much a value can multiply another by."""
    if isinstance(value, (str, bytes, list, tuple)):
        return len(value)
    return abs(value) if isinstance(value, int) else 1


def _peak_bytes() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

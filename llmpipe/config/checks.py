"""What refuses a wrong value or an unknown name, and says what is allowed. It knows no option by itself."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

from llmpipe.exceptions import LLMConfigError, LLMError
from llmpipe.quoting import quoted, shortened
from llmpipe.redaction import References, as_written

LARGEST = 2**31 - 1
"""Most that a backend can count to: a larger number would wrap around in its library."""


_references: ContextVar[References] = ContextVar("references", default=MappingProxyType({}))


@contextmanager
def naming(references: References) -> Iterator[None]:
    """Let `check` show what was written where a value came from the environment, inside of a `with` block."""
    token = _references.set(references)
    try:
        yield
    finally:
        _references.reset(token)


def check(ok: bool, name: str, got: object, allowed: str) -> None:
    """Refuse a value that is not `ok`, saying what was got and what is allowed.

    Raises:
        LLMConfigError: names the option, the value and the bounds.
    """
    if not ok:
        got = as_written(got, _references.get(), tuple(re.findall(r"[^.\[\]]+", name)))
        raise LLMConfigError(f"{name}={quoted(got)} is not allowed; it must be {allowed}")


def is_remote(path: str) -> bool:
    """Say whether a path names something that is not on this machine, as `s3://bucket/file` does."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/{1,2}[^/]", path) is not None


@contextmanager
def readable(name: str, got: object, error: type[LLMError] = LLMConfigError) -> Iterator[None]:
    """Name the option, and its value, in what keeps a file that it names from being read.

    Args:
        name: The option.
        got: Its value.
        error: What is raised.
    """
    try:
        yield
    except (OSError, LLMError) as raised:
        fault = raised if isinstance(raised, OSError) else raised.__cause__  # whose own words name no option
        if not isinstance(fault, OSError):
            raise
        where = f"{fault.filename}: " if fault.filename and str(fault.filename) not in str(got) else ""
        raise error(f"{name}={quoted(got)} cannot be read: {where}{fault.strerror or fault}") from fault
    except (ValueError, RuntimeError) as fault:
        if not re.search("null byte|null character|home directory", str(fault)):
            raise
        raise error(f"{name}={quoted(got)} is not allowed; it must be a name of a file: {fault}") from fault


def number(name: str, value: object, low: float, high: float, allowed: str, *, open_low: bool = False) -> None:
    """Refuse what is not a number in [low, high], or with `open_low` in (low, high].

    Raises:
        LLMConfigError: as `check`.
    """
    # Comparisons rather than isfinite, which fails on integers too large for a float; NaN is inside of nothing.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside = is_number and (low < value if open_low else low <= value) and value <= high  # type: ignore[operator]
    check(bool(inside), name, value, allowed)


def count(name: str, value: object, low: int, allowed: str, high: int | None = LARGEST) -> None:
    """Refuse what is not an integer of at least `low`, and at most `high`.

    Raises:
        LLMConfigError: as `check`.
    """
    is_count = isinstance(value, int) and not isinstance(value, bool)
    check(is_count and value >= low, name, value, allowed)  # type: ignore[operator]
    check(high is None or value <= high, name, value, f"at most {high}")  # type: ignore[operator]


def auto_or_bool(name: str, value: object) -> None:
    """Refuse what is neither `auto` nor a boolean.

    Raises:
        LLMConfigError: as `check`.
    """
    check(value == "auto" or isinstance(value, bool), name, value, "auto, true or false")


def reject_unknown(given: Iterable[str], allowed: Iterable[str], what: str, extra: Iterable[str] = ()) -> None:
    """Refuse the first name of `given` that is not in `allowed`, naming the nearest and all valid ones.

    Raises:
        LLMConfigError: a name is unknown.
    """
    allowed = list(allowed)
    for name in given:
        if name not in allowed:
            raise LLMConfigError(unknown_name(name, [*allowed, *extra], what))


def unknown_name(name: object, allowed: Iterable[str], what: str) -> str:
    """Say that `name` is unknown, which name is nearest, and which there are."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(shortened(str(name)), allowed, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown {what} {quoted(name)}{hint} There are: {', '.join(allowed)}"

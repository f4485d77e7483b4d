"""What came from the environment → the reference that stands for it, such as `${oc.env:API_KEY}`.

The model gets the value; what is written or said has the reference. Of a configuration that is exact: each option that
was read from the environment is known by its place (`as_written`), and where a run is compared with an earlier one, a
digest of the value stands beside the reference (`sealed`). Texts that others make, such as messages, log lines and what
a runner says of itself, are searched for the values (`redacted`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from llmpipe.quoting import shortened

T = TypeVar("T")
Place = tuple[str, ...]
"""Where a value stands in nested plain values: keys, and numbers in lists."""
References = Mapping[Place, str]
"""What was written where a value came from the environment."""

LEAST = 6
"""Fewest characters of a value that texts are searched for: short ones, such as 1 or true, are everywhere."""
_SEALED = re.compile(r"(?s)(.*) \(scrypt ([0-9a-f]{32}) ([0-9a-f]{32})\)")
_concealed: dict[str, str] = {}
_pattern = re.compile(r"(?!)")


def conceal(value: Any, reference: str) -> None:
    """Let `redacted` put a reference where a text is, or one of those inside of lists, maps and JSON, from now on.

    The name of a directory is no secret: it stands in the path of everything that is in it.
    """
    global _pattern
    if isinstance(value, (Mapping, list)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            conceal(inner, reference)
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            conceal(json.loads(value), reference)
    if not isinstance(value, str) or (os.path.isabs(value) and os.path.isdir(value)):
        return
    quoted = (repr(value), json.dumps(value), json.dumps(value, ensure_ascii=False))
    beside_quotes = repr(f"{value}'\"")[1:-4]  # within a text that has both kinds, repr escapes one
    forms = {value, value.strip(), " ".join(value.split()), *(text[1:-1] for text in quoted), beside_quotes}
    for form in forms:
        if len(form) >= LEAST:
            _concealed.setdefault(form, reference)
            _concealed.setdefault(reference, reference)  # in which nothing else is to be found
    _pattern = re.compile("|".join(map(re.escape, sorted(_concealed, key=len, reverse=True))) or "(?!)")


def concealed() -> dict[str, str]:
    """Return what is to be concealed and what stands for it, for `conceal` in another process."""
    return dict(_concealed)


def redacted(value: T) -> T:
    """Return a text, or nested plain values, with references where values from the environment were."""
    found: Any = value
    if isinstance(value, str):
        found = _pattern.sub(lambda match: _concealed[match[0]], value)
    elif isinstance(value, Mapping):
        found = {key: redacted(inner) for key, inner in value.items()}
    elif isinstance(value, (list, tuple)):
        found = [redacted(inner) for inner in value]
        found = found if isinstance(value, list) else tuple(found)
    return value if found == value else found


def as_written(value: Any, references: References, place: Place = ()) -> Any:
    """Return nested plain values with the references where they were, and wherever else their values stand."""
    if place in references:
        return references[place]
    if isinstance(value, Mapping):
        return {key: as_written(inner, references, (*place, str(key))) for key, inner in value.items()}
    if isinstance(value, list):
        return [as_written(inner, references, (*place, str(number))) for number, inner in enumerate(value)]
    return redacted(value)


def below(references: References, *place: str) -> dict[Place, str]:
    """Return the references of one part of a configuration, by their places in it."""
    return {path[len(place) :]: text for path, text in references.items() if path[: len(place)] == place}


def sealed(value: Any, written: Any, known: Any = None) -> Any:
    """Return nested plain values as they can be kept and compared: references, each with a digest of its value.

    A short secret could be found from a plain digest by trying; scrypt makes each try slow, and its random salt
    makes the tries of one ledger worth nothing for another.

    Args:
        value: The values.
        written: The same, as `as_written` returns them.
        known: What was kept before; of values that are the same, it is returned as it is.
    """
    if known is not None and (value == known or _opens(known, value)):
        return known
    if isinstance(value, Mapping) and isinstance(written, Mapping):
        before = known if isinstance(known, Mapping) else {}
        return {key: sealed(inner, written[key], before.get(key)) for key, inner in value.items()}
    if isinstance(value, list) and isinstance(written, list):
        earlier = known if isinstance(known, list) and len(known) == len(value) else [None] * len(value)
        return [sealed(*each) for each in zip(value, written, earlier, strict=True)]
    if value == written:
        return value
    salt = secrets.token_hex(16)
    return f"{written} (scrypt {salt} {_digest(value, salt)})"


def change(was: Any, now: Any) -> str:
    """Say how a value has changed: what it was, and what it is. Both may be sealed."""
    old, new = (_SEALED.sub(r"\1", value) if isinstance(value, str) else value for value in (was, now))
    if old == new:
        return f"is {new} as before, but with another value"
    return f"was {shortened(repr(old), 1000)}, is {shortened(repr(new), 1000)}"


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Say, for two nested plain values, what was and what is, as `sampling.temperature was 0.0, is 0.7`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield f"{path} {change(old, new)}"


def _opens(known: Any, value: Any) -> bool:
    """Say whether a value is the one that was sealed."""
    match = _SEALED.fullmatch(known) if isinstance(known, str) else None
    return match is not None and secrets.compare_digest(match[3], _digest(value, match[2]))


def _digest(value: Any, salt: str) -> str:
    data = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.scrypt(data, salt=bytes.fromhex(salt), n=2**14, r=8, p=1, dklen=16).hex()


class RedactedFormatter(logging.Formatter):
    """Formats log records as another formatter does, tracebacks included, without what came from the environment."""

    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self._inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's text."""
        return redacted(self._inner.format(record))

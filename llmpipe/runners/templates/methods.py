"""The methods and functions that chat templates may call, and what they may read of an object.

Each takes the rendering first, and counts what it is about to make.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import SandboxedFormatter, safe_range
from jinja2.utils import Cycler, Joiner, Namespace
from markupsafe import Markup

from llmpipe.runners.templates.limits import MOST_BITS, NODE, PART, Rendering

_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"

# --- methods of texts: (rendering, text, …) ---------------------------------------------------------------------------


def _longer(name: str, factor: int = 1) -> Callable[..., Any]:
    """Return the method `name`, whose result is at most so many times as long as the text."""

    def method(rendering: Rendering, text: str, *args: Any) -> Any:
        rendering.spend(len(text) * max([factor, *(len(arg) for arg in args if isinstance(arg, str))]))
        return rendering.made(factor * len(text), getattr(text, name), *args)

    return method


def _looking(name: str) -> Callable[..., Any]:
    """Return the method `name`, which makes nothing but goes through the text."""

    def method(rendering: Rendering, text: str, *args: Any) -> Any:
        rendering.spend(len(text))
        return getattr(text, name)(*args)

    return method


def _parts(name: str) -> Callable[..., Any]:
    """Return the method `name`, which takes a text apart."""

    def method(rendering: Rendering, text: str, sep: Any = None, maxsplit: int = -1) -> Any:
        rendering.spend(len(text))
        parts = text.count(sep) if isinstance(sep, str) and sep else len(text) // 2
        parts = parts if maxsplit < 0 else min(parts, maxsplit)
        rendering.spend(NODE * parts)
        rendering.take(len(text) + PART * (parts + 1))
        return getattr(text, name)(sep, maxsplit)

    return method


def _three_parts(name: str) -> Callable[..., Any]:
    def method(rendering: Rendering, text: str, sep: str) -> Any:
        rendering.spend(len(text))
        rendering.take(len(text) + len(sep))
        return getattr(text, name)(sep)

    return method


def _splitlines(rendering: Rendering, text: str, keepends: bool = False) -> Any:
    rendering.take(len(text) + PART * (count_lines(rendering, text) + 1))
    return text.splitlines(keepends)


def count_lines(rendering: Rendering, text: str) -> int:
    """Return how many lines end in `text`."""
    rendering.spend(len(_LINE_ENDS) * len(text))
    return sum(map(text.count, _LINE_ENDS))


def replace(rendering: Rendering, text: str, old: str, new: str, count: int = -1) -> str:
    """Return `text.replace(old, new, count)`."""
    rendering.spend(len(text))
    found = text.count(old) if count < 0 else min(text.count(old), count)
    new = rendering.escaped(new) if isinstance(text, Markup) else new
    rendering.spend(10 * found)
    return rendering.made(len(text) + found * len(new), text.replace, old, new, count)


def join(rendering: Rendering, text: str, values: Iterable[Any]) -> str:
    """Return `text.join(values)`."""
    parts = rendering.listed(values)
    if isinstance(text, Markup):
        parts = list(map(rendering.escaped, parts))
    most = sum(len(part) for part in parts if isinstance(part, str)) + len(text) * len(parts)
    return rendering.made(most, text.join, parts)


def _padded(name: str) -> Callable[..., Any]:
    def method(rendering: Rendering, text: str, width: int, *fill: str) -> Any:
        return rendering.made(max(len(text), width), getattr(text, name), width, *fill)

    return method


_CONVERSIONS: dict[str, Callable[[Any], str]] = {"s": str, "r": repr, "a": ascii}


class _BoundedFormatter(SandboxedFormatter):
    """The sandbox's `str.format`, with a look at what each field is about to become."""

    def __init__(self, rendering: Rendering, escape: bool) -> None:
        super().__init__(rendering.environment)
        self._rendering = rendering
        self._escape = escape

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """Do what `!s`, `!r` and `!a` say."""
        if conversion is None:
            return value
        if conversion not in _CONVERSIONS:
            raise ValueError(f"unknown conversion {conversion!r}")
        return self._rendering.text(value, _CONVERSIONS[conversion])

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        """Return the value of a field."""
        return super().get_field(self._rendering.key(field_name), args, kwargs)

    def format_field(self, value: Any, format_spec: str) -> str:
        """Return a field as text."""
        rendering = self._rendering
        rendering.spend(10 * NODE)
        safe = not self._escape or isinstance(value, Markup)
        if not isinstance(value, (int, float)):
            value = rendering.text(value)
        most = sum(map(rendering.width, re.findall(r"\d+", format_spec)))
        most += len(value) if isinstance(value, str) else 2 * MOST_BITS
        text = rendering.made(most, format, value, format_spec)
        return text if safe else rendering.escaped(text)


def _format(rendering: Rendering, text: str, *args: Any, **options: Any) -> str:
    rendering.take(len(text))
    return type(text)(_BoundedFormatter(rendering, isinstance(text, Markup)).vformat(str(text), args, options))


_SAME = "strip lstrip rstrip removeprefix removesuffix"
_OTHER_CASE = "lower upper capitalize title casefold swapcase"
_LOOKS = (
    "startswith endswith find rfind index rindex count isalnum isalpha isascii isdecimal isdigit isidentifier islower "
    "isnumeric isprintable isspace istitle isupper"
)
TEXT_METHODS: dict[str, Callable[..., Any]] = {
    **{name: _longer(name) for name in _SAME.split()},
    **{name: _longer(name, 3) for name in _OTHER_CASE.split()},
    **{name: _looking(name) for name in _LOOKS.split()},
    **{name: _parts(name) for name in ("split", "rsplit")},
    **{name: _three_parts(name) for name in ("partition", "rpartition")},
    **{name: _padded(name) for name in ("center", "ljust", "rjust", "zfill")},
    "splitlines": _splitlines,
    "replace": replace,
    "join": join,
    "format": _format,
}

# --- methods of dicts, lists and others -------------------------------------------------------------------------------


def _get(rendering: Rendering, values: dict[Any, Any], key: Any, default: Any = None) -> Any:
    return values.get(rendering.key(key), default)


def _copy(rendering: Rendering, values: Any) -> Any:
    rendering.take(PART * len(values))
    return values.copy()


def _compared_with_all(name: str) -> Callable[..., Any]:
    def method(rendering: Rendering, values: Any, value: Any) -> Any:
        rendering.spend(len(values) * (NODE + rendering.written(value)))
        return getattr(values, name)(value)

    return method


def _changed(rendering: Rendering, loop: LoopContext, *values: Any) -> bool:
    rendering.weigh_both(values, values)
    return loop.changed(*values)


def _plain(name: str) -> Callable[..., Any]:
    def method(rendering: Rendering, owner: Any, *args: Any) -> Any:
        return getattr(owner, name)(*args)

    return method


_LIST_METHODS = {"count": _compared_with_all("count"), "index": _compared_with_all("index")}
METHODS: dict[type, dict[str, Callable[..., Any]]] = {
    str: TEXT_METHODS,
    Markup: TEXT_METHODS,
    dict: {"get": _get, "copy": _copy, **{name: _plain(name) for name in ("items", "keys", "values")}},
    list: {"copy": _copy, **_LIST_METHODS},
    tuple: _LIST_METHODS,
    LoopContext: {"changed": _changed, "cycle": _plain("cycle")},
    Cycler: {"next": _plain("next"), "reset": _plain("reset")},
}
"""Methods by the type whose they are, called with the rendering, the object, and the arguments."""
_LOOP_VALUES = "depth depth0 first index index0 last length nextitem previtem revindex revindex0"
ATTRIBUTES: dict[type, frozenset[str]] = {
    **{kind: frozenset(methods) for kind, methods in METHODS.items()},
    LoopContext: frozenset([*METHODS[LoopContext], *_LOOP_VALUES.split()]),
    Cycler: frozenset([*METHODS[Cycler], "current"]),
    Macro: frozenset(["name", "arguments", "caller", "catch_kwargs", "catch_varargs"]),
}
"""What may be read of an object that is not its item."""

# --- functions: (rendering, …) ----------------------------------------------------------------------------------------


def _range(rendering: Rendering, *bounds: int) -> range:
    return safe_range(*bounds)


def _dict(rendering: Rendering, *pairs: Any, **values: Any) -> dict[Any, Any]:
    if len(pairs) > 1:
        raise TypeError("dict takes one list of pairs")
    for given in pairs:
        given = given.items() if isinstance(given, Mapping) else given
        found = {}
        for pair in rendering.listed(given):
            key, value = pair
            found[rendering.key(key)] = value
        rendering.take(PART * len(found))
        values = {**found, **values}
    return values


def _namespace(rendering: Rendering, *pairs: Any, **values: Any) -> Namespace:
    return Namespace(_dict(rendering, *pairs, **values))


def _cycler(rendering: Rendering, *items: Any) -> Cycler:
    return Cycler(*items)


def _joiner(rendering: Rendering, sep: str = ", ") -> Joiner:
    return Joiner(sep)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "range": _range,
    "dict": _dict,
    "namespace": _namespace,
    "cycler": _cycler,
    "joiner": _joiner,
}

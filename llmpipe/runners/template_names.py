"""What a chat template may use: statements, filters, tests, functions, and methods; each with what bounds it.

These are the names that the templates of published models use, and those their authors could plausibly want. Whatever
is not here is refused by name. Each function takes the rendering first, and counts what it is about to make.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import Undefined, filters, nodes, tests
from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import SandboxedFormatter, safe_range
from jinja2.utils import Cycler, Joiner, Namespace, pass_context
from markupsafe import Markup

from llmpipe.runners.template_limits import MOST_BITS, NODE, PART, Rendering

STATEMENTS: tuple[type[nodes.Node], ...] = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Assign, nodes.AssignBlock, nodes.NSRef, nodes.With),
    *(nodes.If, nodes.For, nodes.Break, nodes.Continue, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.Scope),
    *(nodes.Expr, nodes.Pair, nodes.Keyword, nodes.Operand),
)
"""The parts of the language; what loads other templates is not among them."""
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
    rendering.take(len(text) + PART * (_count_lines(rendering, text) + 1))
    return text.splitlines(keepends)


def _count_lines(rendering: Rendering, text: str) -> int:
    rendering.spend(len(_LINE_ENDS) * len(text))
    return sum(map(text.count, _LINE_ENDS))


def _replace(rendering: Rendering, text: str, old: str, new: str, count: int = -1) -> str:
    rendering.spend(len(text))
    found = text.count(old) if count < 0 else min(text.count(old), count)
    new = rendering.escaped(new) if isinstance(text, Markup) else new
    rendering.spend(10 * found)
    return rendering.made(len(text) + found * len(new), text.replace, old, new, count)


def _join(rendering: Rendering, text: str, values: Iterable[Any]) -> str:
    parts = rendering.items(values)
    if isinstance(text, Markup):
        parts = list(map(rendering.escaped, parts))
    most = sum(len(part) for part in parts if isinstance(part, str)) + len(text) * len(parts)
    return rendering.made(most, text.join, parts)


def _padded(name: str) -> Callable[..., Any]:
    def method(rendering: Rendering, text: str, width: int, *fill: str) -> Any:
        return rendering.made(max(len(text), width), getattr(text, name), width, *fill)

    return method


class _BoundedFormatter(SandboxedFormatter):
    """The sandbox's `str.format`, with a look at what each field is about to become."""

    def __init__(self, rendering: Rendering) -> None:
        super().__init__(rendering.environment)
        self._rendering = rendering

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """Do what `!s`, `!r` and `!a` say."""
        if conversion is None:
            return value
        if conversion not in ("s", "r", "a"):
            raise ValueError(f"unknown conversion {conversion!r}")
        return self._rendering.text(value, {"s": str, "r": repr, "a": ascii}[conversion])

    def format_field(self, value: Any, format_spec: str) -> str:
        """Return a field as text."""
        rendering = self._rendering
        rendering.spend(10 * NODE)
        if not isinstance(value, (int, float)):
            value = rendering.text(value)
        most = sum(map(rendering.width, re.findall(r"\d+", format_spec)))
        most += len(value) if isinstance(value, str) else 2 * MOST_BITS
        return rendering.made(most, format, value, format_spec)


def _format(rendering: Rendering, text: str, *args: Any, **options: Any) -> str:
    if isinstance(text, Markup):
        raise SecurityError("it calls format of a text that is marked safe")
    rendering.take(len(text))
    return _BoundedFormatter(rendering).vformat(text, args, options)


_SAME = "strip lstrip rstrip removeprefix removesuffix"
_OTHER_CASE = "lower upper capitalize title casefold swapcase"
_LOOKS = (
    "startswith endswith find rfind index rindex count isalnum isalpha isascii isdecimal isdigit isidentifier islower "
    "isnumeric isprintable isspace istitle isupper"
)
_TEXT_METHODS: dict[str, Callable[..., Any]] = {
    **{name: _longer(name) for name in _SAME.split()},
    **{name: _longer(name, 3) for name in _OTHER_CASE.split()},
    **{name: _looking(name) for name in _LOOKS.split()},
    **{name: _parts(name) for name in ("split", "rsplit")},
    **{name: _three_parts(name) for name in ("partition", "rpartition")},
    **{name: _padded(name) for name in ("center", "ljust", "rjust", "zfill")},
    "splitlines": _splitlines,
    "replace": _replace,
    "join": _join,
    "format": _format,
}

# --- methods of dicts, lists and others -------------------------------------------------------------------------------


def _get(rendering: Rendering, values: dict[Any, Any], key: Any, default: Any = None) -> Any:
    rendering.check_key(key)
    return values.get(key, default)


def _copy(rendering: Rendering, values: Any) -> Any:
    rendering.take(PART * len(values))
    return values.copy()


def _compared_with_all(name: str) -> Callable[..., Any]:
    def method(rendering: Rendering, values: Any, value: Any) -> Any:
        rendering.spend(len(values) * (NODE + sum(rendering.weigh(value, strict=False)[:2])))
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
    str: _TEXT_METHODS,
    Markup: _TEXT_METHODS,
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
        for pair in rendering.items(given):
            key, value = pair
            rendering.check_key(key)
            found[key] = value
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

# --- filters: (rendering, value, …) -----------------------------------------------------------------------------------


def _of_text(name: str) -> Callable[..., Any]:
    """Return the filter that is a method of the text of its value."""

    def function(rendering: Rendering, value: Any, *args: Any) -> Any:
        value = value if isinstance(value, str) else rendering.text(value)
        return _TEXT_METHODS[name](rendering, value, *args)

    return function


def _sized(function: Callable[..., Any], factor: int = 1) -> Callable[..., Any]:
    """Return a filter of a text that makes at most so many characters of each."""

    def bounded(rendering: Rendering, value: Any, *args: Any, **options: Any) -> Any:
        value = value if isinstance(value, str) else rendering.text(value)
        rendering.reserve(factor * len(value))
        result = function(value, *args, **options)
        rendering.take(factor * len(value) if not isinstance(result, str) else len(result))
        return result

    return bounded


def _eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter whose items are made at once, so that no chain of generators grows; still to be gone through once."""

    def filtered(rendering: Rendering, values: Any, *args: Any, **options: Any) -> Iterator[Any]:
        found = rendering.items(values) if values else []
        return iter(rendering.items(function(rendering, found, *args, **options)))

    return filtered


def _first(rendering: Rendering, values: Iterable[Any]) -> Any:
    return filters.sync_do_first(rendering.environment, values)


def _last(rendering: Rendering, values: Any) -> Any:
    return filters.do_last(rendering.environment, values)


def _items(rendering: Rendering, value: Any) -> Iterator[Any]:
    if not isinstance(value, (Mapping, Undefined)):
        raise TypeError("Can only get item pairs from a mapping.")
    return iter(value.items()) if isinstance(value, Mapping) else iter(())


def _batch(rendering: Rendering, values: Iterable[Any], size: int, fill_with: Any = None) -> Iterator[Any]:
    rendering.take(PART * max(size, 0))
    return iter(rendering.items(filters.do_batch(rendering.items(values), size, fill_with)))


def _slice(rendering: Rendering, values: Iterable[Any], slices: int, fill_with: Any = None) -> Iterator[Any]:
    rendering.take(PART * max(slices, 0))
    return iter(rendering.items(filters.sync_do_slice(rendering.items(values), slices, fill_with)))


def _reverse(rendering: Rendering, value: Any) -> Any:
    if isinstance(value, str):
        return rendering.made(len(value), operator.getitem, value, slice(None, None, -1))
    return reversed(rendering.items(value))


def _keys(rendering: Rendering, values: list[Any], attribute: Any, case_sensitive: bool) -> list[Any]:
    """Return what `values` are told apart by, and count the work of comparing them."""
    keys = list(map(filters.make_multi_attrgetter(rendering.environment, attribute), values))
    weight = rendering.weigh(keys, strict=False)
    rendering.spend((weight.characters + NODE * weight.items) * (1 + len(values).bit_length()))
    rendering.take(weight.characters + PART * weight.items)
    return keys if case_sensitive else [list(map(filters.ignore_case, key)) for key in keys]


def _sort(
    rendering: Rendering,
    values: Iterable[Any],
    reverse: bool = False,
    case_sensitive: bool = False,
    attribute: Any = None,
) -> list[Any]:
    found = rendering.items(values)
    keys = _keys(rendering, found, attribute, case_sensitive)
    order = sorted(range(len(found)), key=keys.__getitem__, reverse=reverse)
    return [found[place] for place in order]


def _dictsort(
    rendering: Rendering, value: Mapping[Any, Any], case_sensitive: bool = False, by: str = "key", reverse: bool = False
) -> list[Any]:
    if by not in ("key", "value"):
        raise TypeError('You can only sort by either "key" or "value"')
    return _sort(rendering, value.items(), reverse, case_sensitive, 0 if by == "key" else 1)


def _unique(
    rendering: Rendering, values: Iterable[Any], case_sensitive: bool = False, attribute: Any = None
) -> Iterator[Any]:
    found, first = rendering.items(values), {}
    for value, keys in zip(found, _keys(rendering, found, attribute, case_sensitive), strict=True):
        rendering.check_key(keys[0])
        first.setdefault(keys[0], value)
    return iter(first.values())


def _extreme(choose: Callable[..., Any]) -> Callable[..., Any]:
    def function(
        rendering: Rendering, values: Iterable[Any], case_sensitive: bool = False, attribute: Any = None
    ) -> Any:
        found = rendering.items(values)
        if not found:
            return rendering.environment.undefined("No aggregated item, sequence was empty.")
        keys = _keys(rendering, found, attribute, case_sensitive)
        return found[choose(range(len(found)), key=keys.__getitem__)]

    return function


def _sum(rendering: Rendering, values: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    found = rendering.items(values)
    if attribute is not None:
        found = list(map(filters.make_attrgetter(rendering.environment, attribute), found))
    if isinstance(start, str):
        raise TypeError("sum() can't sum strings")
    for value in found:
        start = rendering.plus(start, value)
    return start


def _joined(rendering: Rendering, values: Any, d: Any = "", attribute: Any = None) -> str:
    found = rendering.items(values)
    if attribute is not None:
        found = list(map(filters.make_attrgetter(rendering.environment, attribute), found))
    return _join(rendering, str(rendering.text(d)), map(rendering.text, found))


def _trim(rendering: Rendering, value: Any, chars: str | None = None) -> str:
    return _TEXT_METHODS["strip"](rendering, value if isinstance(value, str) else rendering.text(value), chars)  # type: ignore[no-any-return]


def _replaced(rendering: Rendering, value: Any, old: Any, new: Any, count: int | None = None) -> str:
    value, old, new = map(rendering.text, (value, old, new))
    return _replace(rendering, value, old, new, -1 if count is None else count)


def _indent(rendering: Rendering, value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    value = value if isinstance(value, str) else rendering.text(value)
    lines = _count_lines(rendering, value) + 2
    rendering.reserve(PART * lines)
    most = 2 * len(value) + lines * (1 + (len(width) if isinstance(width, str) else max(width, 0)))
    return rendering.made(most, filters.do_indent, value, width, first, blank)


def _int(rendering: Rendering, value: Any, default: Any = 0, base: int = 10) -> Any:
    if isinstance(value, str):
        rendering.spend(len(value))
        if base != 10 and len(value) > 4300:
            raise SecurityError("it reads a huge number")
    return filters.do_int(value, default, base)


def _float(rendering: Rendering, value: Any, default: Any = 0.0) -> Any:
    if isinstance(value, str):
        rendering.spend(len(value))
    return filters.do_float(value, default)


def _round(rendering: Rendering, value: Any, precision: int = 0, method: Any = "common") -> Any:
    if abs(precision) > 400 or not isinstance(method, str):
        raise SecurityError("it rounds to a huge number of digits")
    return filters.do_round(value, precision, method)


def _formatted(rendering: Rendering, value: Any, *args: Any, **options: Any) -> str:
    if args and options:
        raise TypeError("can't handle positional and keyword arguments at the same time")
    return rendering.percent(value if isinstance(value, str) else rendering.text(value), options or args)


def _truncate(rendering: Rendering, value: Any, *args: Any, **options: Any) -> str:
    value = value if isinstance(value, str) else rendering.text(value)
    ends = sum(len(end) for end in (*args, *options.values()) if isinstance(end, str))
    return rendering.made(len(value) + ends, filters.do_truncate, rendering.environment, value, *args, **options)


def _safe(rendering: Rendering, value: Any) -> Markup:
    return rendering.made(0, Markup, value if isinstance(value, str) else rendering.text(value))


def _string(rendering: Rendering, value: Any) -> str:
    return value if isinstance(value, str) else rendering.text(value)


def _tojson(
    rendering: Rendering,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    items, characters, depth = rendering.weigh(value)
    rendering.spend(4 * characters)
    space = len(indent) if isinstance(indent, str) else max(indent or 0, 0)
    each = 8 + sum(map(len, separators or ())) + (1 + space) * depth * (indent is not None)
    return rendering.made(
        (12 if ensure_ascii else 6) * characters + each * items,
        json.dumps,
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


CHARGED = "work of an expression"
"""A filter that no template can name: it counts the work of an expression that is no statement's."""


def _charged(rendering: Rendering, value: Any, work: int) -> Any:
    rendering.spend(work)
    return value


FILTERS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "count": len,
    "d": filters.do_default,
    "default": filters.do_default,
    "length": len,
    **{
        name: pass_context(function)
        for name, function in {
            "batch": _batch,
            "capitalize": _of_text("capitalize"),
            "dictsort": _dictsort,
            "e": Rendering.escaped,
            "escape": Rendering.escaped,
            "first": _first,
            "float": _float,
            "format": _formatted,
            "indent": _indent,
            "int": _int,
            "items": _items,
            "join": _joined,
            "last": _last,
            "list": Rendering.items,
            "lower": _of_text("lower"),
            "map": _eager(filters.sync_do_map),
            "max": _extreme(max),
            "min": _extreme(min),
            "reject": _eager(filters.sync_do_reject),
            "rejectattr": _eager(filters.sync_do_rejectattr),
            "replace": _replaced,
            "reverse": _reverse,
            "round": _round,
            "safe": _safe,
            "select": _eager(filters.sync_do_select),
            "selectattr": _eager(filters.sync_do_selectattr),
            "slice": _slice,
            "sort": _sort,
            "string": _string,
            "sum": _sum,
            "title": _sized(filters.do_title, PART),
            "tojson": _tojson,
            "trim": _trim,
            "truncate": _truncate,
            "unique": _unique,
            "upper": _of_text("upper"),
            "wordcount": _sized(filters.do_wordcount, PART),
            CHARGED: _charged,
        }.items()
    },
}

# --- tests: (rendering, value, …) -------------------------------------------------------------------------------------


def _comparing(name: str) -> Callable[..., Any]:
    def test(rendering: Rendering, value: Any, other: Any) -> Any:
        return rendering.compared(name, value, other)

    return test


def _numeric(function: Callable[..., bool]) -> Callable[..., Any]:
    def test(rendering: Rendering, value: Any, *args: int) -> bool:
        if isinstance(value, str):
            raise TypeError("a text is neither odd nor even, and nothing divides it")
        return function(value, *args)

    return test


def _cased(function: Callable[[str], bool]) -> Callable[..., Any]:
    def test(rendering: Rendering, value: Any) -> bool:
        text = rendering.text(value)
        rendering.spend(len(text))
        return function(text)

    return test


_COMPARISONS = {
    "==": "== eq equalto",
    "!=": "!= ne",
    "<": "< lt lessthan",
    "<=": "<= le",
    ">": "> gt greaterthan",
    ">=": ">= ge",
    "in": "in",
}
_KINDS = (
    "defined undefined none boolean false true integer float number string mapping sequence iterable callable escaped"
)
TESTS: dict[str, Callable[..., Any]] = {
    **{name: tests.TESTS[name] for name in [*_KINDS.split(), "sameas"]},
    **{name: pass_context(_comparing(sign)) for sign, names in _COMPARISONS.items() for name in names.split()},
    **{name: pass_context(_numeric(tests.TESTS[name])) for name in ("odd", "even", "divisibleby")},
    **{name: pass_context(_cased(tests.TESTS[name])) for name in ("lower", "upper")},
}

"""The filters and tests that chat templates may use.

They are those that the templates of published models use, and what their authors could plausibly want besides. Each
takes the rendering first, where it makes something, and counts what it is about to make. The results are Jinja's.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import filters, tests
from jinja2.exceptions import SecurityError
from jinja2.utils import pass_context
from markupsafe import Markup

from llmpipe.runners.templates.limits import LARGE, NODE, PART, Rendering
from llmpipe.runners.templates.methods import TEXT_METHODS, count_lines, join, replace

# --- filters: (rendering, value, …) -----------------------------------------------------------------------------------


def _string(rendering: Rendering, value: Any) -> str:
    return value if isinstance(value, str) else rendering.text(value)


def _of_text(name: str) -> Callable[..., Any]:
    """Return the filter that is a method of the text of its value."""

    def function(rendering: Rendering, value: Any, *args: Any) -> Any:
        value = _string(rendering, value)
        return TEXT_METHODS[name](rendering, value, *args)

    return function


def _sized(function: Callable[..., Any], factor: int = 1) -> Callable[..., Any]:
    """Return a filter of a text that makes at most so many characters of each."""

    def bounded(rendering: Rendering, value: Any, *args: Any, **options: Any) -> Any:
        value = _string(rendering, value)
        rendering.reserve(factor * len(value))
        rendering.spend(factor * len(value))
        return function(value, *args, **options)

    return bounded


def _check_path(rendering: Rendering, path: Any, values: list[Any]) -> None:
    """Count the work of looking up `path`, such as `function.name`, in each of `values`."""
    if isinstance(path, str):
        rendering.spend(NODE * len(rendering.key(path)) * len(values))


def _once(function: Callable[..., Iterable[Any]]) -> Callable[..., Iterator[Any]]:
    """Return a filter whose values can be gone through once, as those of Jinja's generators.

    They are made at once, so that no chain of generators grows; what fails still does so when it is reached.
    """

    def filtered(rendering: Rendering, value: Any, *args: Any, **options: Any) -> Iterator[Any]:
        found: list[Any] = []
        try:
            for item in function(rendering, value, *args, **options):
                rendering.spend(NODE)
                rendering.take(PART)
                found.append(item)
        except SecurityError:
            raise
        except Exception as error:
            return _then_fail(found, error.with_traceback(None))
        return iter(found)

    return filtered


def _then_fail(values: list[Any], error: Exception) -> Iterator[Any]:
    yield from values
    raise error


def _of_each(function: Callable[..., Iterable[Any]]) -> Callable[..., Iterable[Any]]:
    """Return one of Jinja's filters that look up or test something in each value."""

    def of_each(rendering: Rendering, values: Any, *args: Any, **options: Any) -> Iterable[Any]:
        found = rendering.listed(values) if values else []
        _check_path(rendering, options.get("attribute", args[0] if args else None), found)
        return function(rendering, found, *args, **options)

    return of_each


def _first(rendering: Rendering, values: Iterable[Any]) -> Any:
    return filters.sync_do_first(rendering.environment, values)


def _last(rendering: Rendering, values: Any) -> Any:
    return filters.do_last(rendering.environment, values)


def _items(rendering: Rendering, value: Any) -> Iterable[Any]:
    return filters.do_items(value)


def _batch(rendering: Rendering, values: Iterable[Any], size: int, fill_with: Any = None) -> Iterable[Any]:
    rendering.take(PART * max(operator.index(size), 0))
    return filters.do_batch(rendering.listed(values), size, fill_with)


def _slice(rendering: Rendering, values: Iterable[Any], slices: int, fill_with: Any = None) -> Iterable[Any]:
    rendering.take(PART * max(operator.index(slices), 0))
    return filters.sync_do_slice(rendering.listed(values), slices, fill_with)


def _reverse(rendering: Rendering, value: Any) -> Any:
    if isinstance(value, str):
        return rendering.made(len(value), operator.getitem, value, slice(None, None, -1))
    return reversed(rendering.listed(value))


def _keys(rendering: Rendering, values: list[Any], attribute: Any, case_sensitive: bool) -> list[Any]:
    """Return what `values` are told apart by, and count the work of comparing them."""
    _check_path(rendering, attribute, values)
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
    found = rendering.listed(values)
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
) -> Iterable[Any]:
    found = rendering.listed(values)
    first: dict[Any, Any] = {}
    for value, keys in zip(found, _keys(rendering, found, attribute, case_sensitive), strict=True):
        first.setdefault(rendering.key(keys[0]), value)
    return first.values()


def _extreme(choose: Callable[..., Any]) -> Callable[..., Any]:
    def function(
        rendering: Rendering, values: Iterable[Any], case_sensitive: bool = False, attribute: Any = None
    ) -> Any:
        found = rendering.listed(values)
        if not found:
            return rendering.environment.undefined("No aggregated item, sequence was empty.")
        keys = _keys(rendering, found, attribute, case_sensitive)
        return found[choose(range(len(found)), key=keys.__getitem__)]

    return function


def _sum(rendering: Rendering, values: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    found = rendering.listed(values)
    if attribute is not None:
        _check_path(rendering, attribute, found)
        found = list(map(filters.make_attrgetter(rendering.environment, attribute), found))
    if isinstance(start, str):
        raise TypeError("sum() can't sum strings")
    for value in found:
        start = rendering.plus(start, value)
    return start


def _joined(rendering: Rendering, values: Any, d: Any = "", attribute: Any = None) -> str:
    found = rendering.listed(values)
    if attribute is not None:
        _check_path(rendering, attribute, found)
        found = list(map(filters.make_attrgetter(rendering.environment, attribute), found))
    return join(rendering, str(rendering.text(d)), map(rendering.text, found))


def _trim(rendering: Rendering, value: Any, chars: str | None = None) -> str:
    return TEXT_METHODS["strip"](rendering, _string(rendering, value), chars)  # type: ignore[no-any-return]


def _replaced(rendering: Rendering, value: Any, old: Any, new: Any, count: int | None = None) -> str:
    value, old, new = map(rendering.text, (value, old, new))
    return replace(rendering, value, old, new, -1 if count is None else count)


def _indent(rendering: Rendering, value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    value = _string(rendering, value)
    lines = count_lines(rendering, value) + 2
    rendering.reserve(PART * lines)
    most = 2 * len(value) + lines * (1 + (len(width) if isinstance(width, str) else max(operator.index(width), 0)))
    return rendering.made(most, filters.do_indent, value, width, first, blank)


def _check_number(value: Any) -> None:
    if isinstance(value, str) and len(value) > LARGE:
        raise SecurityError(f"it reads a number of {len(value):,} characters")


def _int(rendering: Rendering, value: Any, default: Any = 0, base: int = 10) -> Any:
    _check_number(value)
    return filters.do_int(value, default, base)


def _float(rendering: Rendering, value: Any, default: Any = 0.0) -> Any:
    _check_number(value)
    return filters.do_float(value, default)


def _round(rendering: Rendering, value: Any, precision: Any = 0, method: Any = "common") -> Any:
    if abs(precision) > 400:
        raise SecurityError("it rounds to a huge number of digits")
    method = rendering.key(method)
    return filters.do_round(value, precision, method)


def _formatted(rendering: Rendering, value: Any, *args: Any, **options: Any) -> str:
    if args and options:
        raise TypeError("can't handle positional and keyword arguments at the same time")
    return rendering.percent(_string(rendering, value), options or args)


def _truncate(rendering: Rendering, value: Any, *args: Any, **options: Any) -> Any:
    ends = sum(len(end) for end in (*args, *options.values()) if isinstance(end, str))
    return rendering.made(2 * len(value) + ends, filters.do_truncate, rendering.environment, value, *args, **options)


def _safe(rendering: Rendering, value: Any) -> Markup:
    return rendering.made(0, Markup, _string(rendering, value))


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
    space = len(indent) if isinstance(indent, str) else max(operator.index(indent or 0), 0)
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
    rendering.spend(max(operator.index(work), 0))
    return value


_COUNTED: dict[str, Callable[..., Any]] = {
    "batch": _once(_batch),
    "capitalize": _of_text("capitalize"),
    "dictsort": _dictsort,
    "e": Rendering.escaped,
    "escape": Rendering.escaped,
    "first": _first,
    "float": _float,
    "format": _formatted,
    "indent": _indent,
    "int": _int,
    "items": _once(_items),
    "join": _joined,
    "last": _last,
    "list": Rendering.listed,
    "lower": _of_text("lower"),
    "map": _once(_of_each(filters.sync_do_map)),
    "max": _extreme(max),
    "min": _extreme(min),
    "reject": _once(_of_each(filters.sync_do_reject)),
    "rejectattr": _once(_of_each(filters.sync_do_rejectattr)),
    "replace": _replaced,
    "reverse": _reverse,
    "round": _round,
    "safe": _safe,
    "select": _once(_of_each(filters.sync_do_select)),
    "selectattr": _once(_of_each(filters.sync_do_selectattr)),
    "slice": _once(_slice),
    "sort": _sort,
    "string": _string,
    "sum": _sum,
    "title": _sized(filters.do_title, PART),
    "tojson": _tojson,
    "trim": _trim,
    "truncate": _truncate,
    "unique": _once(_unique),
    "upper": _of_text("upper"),
    "wordcount": _sized(filters.do_wordcount, PART),
    CHARGED: _charged,
}
FILTERS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "count": len,
    "d": filters.do_default,
    "default": filters.do_default,
    "length": len,
    **{name: pass_context(function) for name, function in _COUNTED.items()},
}

# --- tests: (rendering, value, …) -------------------------------------------------------------------------------------


def _comparing(name: str) -> Callable[..., Any]:
    def test(rendering: Rendering, value: Any, other: Any) -> Any:
        return rendering.compared(name, value, other)

    return test


def _numeric(function: Callable[..., Any]) -> Callable[..., Any]:
    def test(rendering: Rendering, value: Any, *args: int) -> Any:
        if isinstance(value, str):
            raise TypeError("a text is neither odd nor even, and nothing divides it")
        return function(value, *args)

    return test


def _cased(function: Callable[..., Any]) -> Callable[..., Any]:
    def test(rendering: Rendering, value: Any) -> Any:
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
    "boolean callable defined escaped false float integer iterable mapping none number sameas sequence string true "
    "undefined"
)
_PLAIN_TESTS: dict[str, Any] = {name: tests.TESTS[name] for name in _KINDS.split()}
_COUNTED_TESTS: dict[str, Callable[..., Any]] = {
    **{name: _comparing(sign) for sign, names in _COMPARISONS.items() for name in names.split()},
    "odd": _numeric(tests.test_odd),
    "even": _numeric(tests.test_even),
    "divisibleby": _numeric(tests.test_divisibleby),
    "lower": _cased(tests.test_lower),
    "upper": _cased(tests.test_upper),
}
TESTS: dict[str, Callable[..., Any]] = {
    **_PLAIN_TESTS,
    **{name: pass_context(function) for name, function in _COUNTED_TESTS.items()},
}

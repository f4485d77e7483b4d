"""A value → the type that its option declares, or a refusal that names both. It knows no option by itself.

A value means what it means on the command line, where all is text at first: "8" is a number where one is asked for, 8
is text where that is, and "false" is false. Numbers of data frames are read as what they were: 8.0 is an integer where
one is asked for, whatever library it comes from. Nothing else is converted: a text is no list of its letters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from decimal import Decimal
from enum import Enum
from numbers import Real
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from llmpipe.cells import is_whole
from llmpipe.config.checks import check

Convert = Callable[[str, Any], Any]
"""Takes an option's name and a value; returns the value in the type asked for, or refuses it."""

_WORDS = {True: ("true", "yes", "on", "y", "1"), False: ("false", "no", "off", "n", "0")}
_BOOLS = {word: value for value, words in _WORDS.items() for word in words}


def settle(config: Any, prefix: str = "") -> None:
    """Give each field of a config dataclass the type that it declares.

    Args:
        config: The object, in whose `__post_init__` this is called.
        prefix: What stands before a field's name on the command line, such as `backend.`.

    Raises:
        LLMConfigError: a value cannot be of the type; names the option, the value and what is allowed.
    """
    cls: type = type(config)
    for name, kind, convert in _converters(cls):
        value = getattr(config, name)
        if type(value) is not kind:  # nearly always it is; there may be millions of these, one for each row
            setattr(config, name, convert(prefix + name, value))


@functools.cache
def _converters(cls: type) -> list[tuple[str, Any, Convert]]:
    """Return the fields of a dataclass whose types say something: name, type, and what makes values of the type."""
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        try:
            hints |= get_type_hints(base)
        except NameError:  # of someone else's class, with types that only its type checker can see
            continue
    known = [(f.name, hints[f.name], converter(hints[f.name])) for f in fields(cls) if f.name in hints]
    return [(name, hint, convert) for name, hint, convert in known if convert is not None]


def converter(hint: Any) -> Convert | None:
    """Return the function that converts values to a type; None where the type is unknown here, or takes any value."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _any_of(arguments)
    if origin is list:
        return functools.partial(_list, converter(arguments[0]))
    if origin is dict:
        return functools.partial(_dict, converter(arguments[0]), converter(arguments[1]))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return functools.partial(_member, hint)
    if isinstance(hint, type) and is_dataclass(hint):
        return functools.partial(_instance, hint)
    return _PLAIN.get(hint)


def integer(name: str, value: Any) -> int:
    """Return a whole number, also one that a data frame made a float or that is written as text."""
    found = _plain(value)
    if type(found) is str:
        found = _parsed(int, found)
    check(_is_number(found) and is_whole(found), name, value, "an integer")
    return int(found)


def _float(name: str, value: Any) -> float:
    found = _plain(value)
    if type(found) is str:
        found = _parsed(float, found)
    check(_is_number(found), name, value, "a number")
    return found if isinstance(found, (int, float)) else float(found)


def _bool(name: str, value: Any) -> bool:
    found = _plain(value)
    if type(found) is str:
        found = _BOOLS.get(found.lower(), found)
    elif _is_number(found) and found in (0, 1):
        found = bool(found)
    check(isinstance(found, bool), name, value, "true or false")
    return bool(found)


def _text(name: str, value: Any) -> str:
    found = str(value) if isinstance(value, PurePath) or _is_number(value) else value
    check(isinstance(found, str), name, value, "text")
    return str(found.value if isinstance(found, Enum) else found)


def _list(convert: Convert | None, name: str, value: Any) -> list[Any]:
    found = value.tolist() if hasattr(value, "tolist") else value
    check(isinstance(found, Sequence) and not isinstance(found, (str, bytes)), name, value, "a list, such as [a, b]")
    return [one if convert is None else convert(name, one) for one in found]


def _dict(of_key: Convert | None, of_value: Convert | None, name: str, value: Any) -> dict[Any, Any]:
    check(isinstance(value, Mapping), name, value, "a map, such as {a: 1}")
    return {
        key if of_key is None else of_key(f"a key of {name}", key): (
            one if of_value is None else of_value(f"{name}[{key}]", one)
        )
        for key, one in value.items()
    }


def _member(kind: type[Enum], name: str, value: Any) -> Enum:
    if isinstance(value, kind):
        return value
    words = {True: "on", False: "off"}  # as YAML reads those names
    found = words.get(value, value) if isinstance(value, bool) else value
    members = {**{member.name: member for member in kind}, **{member.value: member for member in kind}}
    names = ", ".join(str(member.value) for member in kind)
    check(isinstance(found, str) and found in members, name, value, f"one of {names}")
    return members[found]


def _instance(kind: type, name: str, value: Any) -> Any:
    check(isinstance(value, kind), name, value, f"a {kind.__name__}")
    return value


def _any_of(kinds: Sequence[Any]) -> Convert | None:
    """Return what takes a value of any of several types as it is, and makes of any other one of the first type."""
    converts = [converter(kind) for kind in kinds if kind is not NoneType]
    if None in converts:
        return None
    optional = NoneType in kinds
    classes = tuple(kind for kind in kinds if isinstance(kind, type) and kind is not NoneType)

    def convert(name: str, value: Any) -> Any:
        if value is None and optional:
            return None
        if len(converts) > 1 and isinstance(value, classes):
            return value
        return converts[0](name, value)  # type: ignore[misc]

    return convert


def _is_number(value: Any) -> bool:
    return isinstance(value, (Real, Decimal)) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """Return a number of numpy, or a tensor of one number, as Python's own."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def _parsed(kind: type, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        return text


_PLAIN: dict[Any, Convert] = {int: integer, float: _float, bool: _bool, str: _text}

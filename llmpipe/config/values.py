"""A config dataclass made from plain values, as plain values, and in words. Knows no dataclass by name, nor Hydra."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from itertools import pairwise
from typing import Any

from llmpipe.config.checks import reject_unknown


def build(cls: type[Any], values: Mapping[str, Any], what: str) -> Any:
    """Make a config dataclass from plain values; unknown names are refused.

    Raises:
        LLMConfigError: a name is unknown, or a value of the wrong type or out of range.
    """
    reject_unknown(values, [f.name for f in fields(cls)], what)
    return cls(**values)


def describe(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain values that JSON can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value

    return {name: plain(value) for name, value in asdict(config).items()}


def answer_fields(config: Any) -> dict[str, Any]:
    """Return the values that decide what a run answers, without those that only decide how fast."""
    values = describe(config)
    return {f.name: values[f.name] for f in fields(config) if not f.metadata.get("speed")}


def field_docs(cls: type) -> dict[str, str]:
    """Return the string under each field of a config dataclass, its bases' included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("llmpipe.config.") and is_dataclass(base):
            docs |= _own_field_docs(base)
    return docs


@functools.cache
def _own_field_docs(cls: type) -> dict[str, str]:
    # Python keeps no strings under fields: they are read from the source.
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        statement.target.id: ast.literal_eval(following.value)
        for statement, following in pairwise(definition.body)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(following, ast.Expr)
    }

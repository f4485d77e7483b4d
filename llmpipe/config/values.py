"""A config dataclass made from plain values, and as plain values. Knows no dataclass by name, nor Hydra."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from enum import Enum
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


def answer_fields(config: Any, last_digits: bool = False) -> dict[str, Any]:
    """Return the values that decide what a run answers, with `last_digits` to the last one."""
    values = describe(config)
    counted = ("answers", "last_digits") if last_digits else ("answers",)
    return {f.name: values[f.name] for f in fields(config) if f.metadata.get("decides", "answers") in counted}

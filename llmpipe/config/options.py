"""How a config dataclass states an option: its default, what it means, what it decides. Knows no option by itself."""

from __future__ import annotations

import copy
from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Any, Literal, TypeVar

Decides = Literal["answers", "last_digits", "nothing"]
"""What an option has a say in: what a run answers, only the rounding of its sums, or only how fast it is.

A run is resumed with the options that it began with, as far as they decide its answers; its last digits count in
reproducible mode.
"""

T = TypeVar("T")


def option(default: T, doc: str, *, decides: Decides = "answers", takes_trust: bool = False) -> T:
    """Declare a field of a config dataclass.

    Args:
        default: Its value where none is given; each object has a copy of its own.
        doc: What it means, for `--help` and the documentation; editors show how it begins where the class is called.
        decides: What it has a say in.
        takes_trust: A model may bring code through it: a person has to set it, no group and no run directory.
    """
    metadata = {"doc": doc, "decides": decides, "takes_trust": takes_trust}
    if type(default).__hash__ is None:  # lists, dictionaries and config dataclasses can be changed
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(field: Field[Any]) -> Any:
    """Return the value that a field has where none is given, a copy of its own."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def field_docs(cls: type) -> dict[str, str]:
    """Return what each field of a config dataclass means; one declared anew without a doc means what it did."""
    bases = [base for base in reversed(cls.__mro__) if is_dataclass(base)]
    return {f.name: f.metadata["doc"] for base in bases for f in fields(base) if "doc" in f.metadata}

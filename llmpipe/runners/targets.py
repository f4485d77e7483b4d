"""An import path, as `backend._target_` has it → the runner class there."""

from __future__ import annotations

import importlib
from inspect import isabstract

from llmpipe.exceptions import LLMConfigError
from llmpipe.runners.base import BaseLLMRunner


def import_class(target: str) -> type[BaseLLMRunner]:
    """Return the runner class of that import path.

    Raises:
        LLMConfigError: it cannot be imported, or is no runner.
    """
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        raise LLMConfigError(f"backend._target_={target!r}: there is no module {error.name}") from error
    except AttributeError as error:
        raise LLMConfigError(f"backend._target_={target!r}: {module} has no {name}") from error
    if not (isinstance(found, type) and issubclass(found, BaseLLMRunner)) or isabstract(found):
        raise LLMConfigError(f"backend._target_={target!r} is no subclass of BaseLLMRunner that can be used")
    return found

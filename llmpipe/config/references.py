"""Which values of a composed configuration came from the environment, and what stands there instead of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from llmpipe.exceptions import LLMConfigError
from llmpipe.redaction import Place, conceal

_asked: ContextVar[set[str] | None] = ContextVar("asked", default=None)
"""Names of the environment's variables that a value was made of, while one is looked at."""


def references_of(node: Any, raw: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Yield what is written where values come from the environment, directly or by way of other keys and resolvers.

    Args:
        node: A part of a composed config.
        raw: The same, unresolved, as plain values.
        place: Where it stands in the config.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for key, text in raw.items() if isinstance(raw, dict) else enumerate(raw):
        here = (*place, str(key))
        if not OmegaConf.is_interpolation(node, key):
            if isinstance(text, (dict, list)):
                yield from references_of(node[key], text, here)
            continue
        asked: set[str] = set()
        token = _asked.set(asked)
        try:
            value = node[key]
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException as error:
            if not asked or asked - os.environ.keys():
                raise
            kind = re.search(r"could not be converted to (\w+)", str(error))  # all that may be told of the value
            why = f"the environment has no {kind[1]} there" if kind else "what the environment has there cannot be read"
            raise LLMConfigError(f"{'.'.join(here)}={text!r} is not allowed: {why}") from None
        finally:
            _asked.reset(token)
        if found := asked & os.environ.keys():
            for name in found:
                reference = f"${{oc.env:{name}}}"
                conceal(os.environ[name], reference if reference[:-1] in text else text)
            conceal(value, text)
        if asked:
            yield here, text


def environment_variable(name: str, *default: Any, _node_: Any) -> Any:
    """Return what OmegaConf's own `oc.env` does, and note that it was asked for."""
    from omegaconf.resolvers import oc

    if _node_ is not None and _node_._get_full_key(None) == "hydra.job.override_dirname":
        return f"oc.env:{name}"  # what may be a directory's name, in which Hydra would look for interpolations again
    asked = _asked.get()
    if asked is not None:
        asked.add(name)
    return oc.env(name, *default)

"""What Hydra and OmegaConf complain of → one readable line: what was got, what is allowed, what to do."""

from __future__ import annotations

import re
from dataclasses import fields

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from llmpipe.config.backends import BACKENDS
from llmpipe.config.checks import unknown_name
from llmpipe.config.run import RunConfig
from llmpipe.records import harmless

FIELDS = "__dataclass_fields__"
_AMBIGUOUS = re.compile(r"Ambiguous value for argument '(\S+?)=(.*)'$", re.MULTILINE)


def one_line(error: Exception) -> str:
    """Return an error as one readable line; an unknown name is followed by those there are."""
    if isinstance(error, OverrideParseException):
        key = error.override.partition("=")[0]
        return (
            f"{harmless(error.override)!r} cannot be read: text with brackets, quotes or commas needs quotes of its "
            f"own inside the shell's, such as '{harmless(key)}=\"Be brief, please.\"'"
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return unknown_name(name, error.options, f"option of {group}")
    if found := _AMBIGUOUS.search(str(error)):
        key, value = found.groups()
        return (
            f"{key}={value} may be a list, text or a sweep: write {key}=[{value}], or '{key}=\"{value}\"', "
            f"or sweep over it with -m"
        )
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OmegaConfBaseException) and cause.full_key is not None):
        cause = cause.__cause__
    if isinstance(cause, OmegaConfBaseException):
        return _of_key(cause)
    return harmless(" ".join(str(error).split()))


def _of_key(error: OmegaConfBaseException) -> str:
    """Return what is wrong with one key of a configuration."""
    parent = error.parent_node
    known = list(parent) if isinstance(parent, DictConfig) and not parent._is_missing() else []
    if known and error.key not in known:
        where = str(error.full_key).rpartition(".")[0]
        if not where and (deeper := _deeper(str(error.key))):
            return f"unknown key {error.key!r}; did you mean {' or '.join(deeper)}?"
        return unknown_name(error.key, map(str, known), f"key in {where}" if where else "key")
    said = (error.msg or str(error)).splitlines()[0]
    if "is not a ListConfig" in said:
        return f"{error.full_key} must be a list, such as {error.full_key}=[a,b]"
    return f"{error.full_key}: {said}"


def _deeper(name: str) -> list[str]:
    """Return the keys of that name inside the groups."""
    keys = [f"{f.name}.{name}" for f in fields(RunConfig) if name in getattr(f.default_factory, FIELDS, ())]
    ours = any(name in getattr(schema, FIELDS) for schema in BACKENDS.values())
    return [*keys, *([f"backend.{name}"] if ours else [])]

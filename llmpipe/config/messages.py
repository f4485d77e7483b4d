"""What Hydra and OmegaConf complain of → one readable line: what was got, what is allowed, what to do."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from llmpipe.config.backends import BACKENDS
from llmpipe.config.checks import unknown_name
from llmpipe.config.options import default_of
from llmpipe.config.run import RunConfig
from llmpipe.exceptions import MOST_CHARACTERS, one_line
from llmpipe.quoting import shortened
from llmpipe.redaction import redacted
from llmpipe.text import harmless

FIELDS = "__dataclass_fields__"
_AMBIGUOUS = re.compile(r"Ambiguous value for argument '(\S+?)=(.*)'$", re.MULTILINE)
_RAISED = re.compile(r"""^\w+ raised while resolving interpolation: ["']?(.*?)["']?$""")


def in_words(error: Exception) -> str:
    """Return what is wrong in one readable line; an unknown name is followed by those there are."""
    return shortened(_in_words(error), MOST_CHARACTERS)


def _in_words(error: Exception) -> str:
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        return (
            f"{harmless(error.override)!r} cannot be read: text with brackets, quotes, commas and the like needs "
            f"quotes of its own inside the shell's, such as {_quoted(harmless(key), harmless(value))}"
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return unknown_name(name, error.options, f"option of {group}")
    if found := _AMBIGUOUS.search(str(error)):
        key, value = found.groups()
        return (
            f"{key}={value} may be a list, text or a sweep: write {key}=[{value}], or {_quoted(key, value)}, "
            f"or sweep over it with -m"
        )
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OmegaConfBaseException) and cause.full_key is not None):
        cause = cause.__cause__
    if isinstance(cause, OmegaConfBaseException):
        return _of_key(cause)
    return harmless(redacted(one_line(error)))


def _quoted(key: str, value: str) -> str:
    """Return how a shell is told that a value is text; of one that has quotes or brackets already, only an example."""
    if not value or value[0] in "\"'[{" or "\\" in value:
        value = "Be brief, please."
    quote = "'" if '"' in value else '"'
    text = value.replace(quote, "\\" + quote)
    if "'" in text and not set('"$`!') & set(text):
        return f'"{key}=\\"{text}\\""'
    return shlex.quote(f"{key}={quote}{text}{quote}")


def _of_key(error: OmegaConfBaseException) -> str:
    """Return what is wrong with one key of a configuration."""
    parent = error.parent_node
    known = list(parent) if isinstance(parent, DictConfig) and not parent._is_missing() else []
    said = redacted(error.msg or str(error)).splitlines()[0]
    if isinstance(error, InterpolationResolutionError):  # what is wrong is what the value refers to, not its key
        said = _RAISED.sub(r"\1", said)
    elif known and error.key not in known:
        where = str(error.full_key).rpartition(".")[0]
        if not where and (deeper := _deeper(str(error.key))):
            return f"unknown key {error.key!r}; did you mean {' or '.join(deeper)}?"
        return unknown_name(error.key, map(str, known), f"key in {where}" if where else "key")
    if "is not a ListConfig" in said:
        return f"{error.full_key} must be a list, such as {error.full_key}=[a,b]"
    return f"{error.full_key}: {said}"


def _deeper(name: str) -> list[str]:
    """Return the keys of that name inside the groups."""
    keys = [f"{f.name}.{name}" for f in fields(RunConfig) if name in getattr(default_of(f), FIELDS, ())]
    ours = any(name in getattr(schema, FIELDS) for schema in BACKENDS.values())
    return [*keys, *([f"backend.{name}"] if ours else [])]

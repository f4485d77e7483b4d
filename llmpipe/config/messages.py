"""What Hydra and OmegaConf complain of → one readable line: what was got, what is allowed, what to do."""

from __future__ import annotations

import re
from dataclasses import fields

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from llmpipe.config.backends import BACKENDS
from llmpipe.config.checks import unknown_name
from llmpipe.config.options import default_of
from llmpipe.config.run import RunConfig
from llmpipe.exceptions import MOST_CHARACTERS, one_line
from llmpipe.quoting import for_shell, shortened
from llmpipe.redaction import redacted
from llmpipe.text import harmless

FIELDS = "__dataclass_fields__"
_AMBIGUOUS = re.compile(r"Ambiguous value for argument '(\S+?)=(.*)'$", re.MULTILINE)
_PLAIN = re.compile(r"[\w/\\+.$%*@?|: \t-]", re.ASCII)
"""What needs no quotes in Hydra's grammar."""
_LIST = re.compile(r"""\[([^\[\]{}"']*)\]""")
_RAISED = re.compile(r"""^\w+ raised while resolving interpolation: ["']?(.*?)["']?$""")


def in_words(error: Exception) -> str:
    """Return what is wrong in one readable line; an unknown name is followed by those there are."""
    return shortened(_in_words(error), MOST_CHARACTERS)


def _in_words(error: Exception) -> str:
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return unknown_name(name, error.options, f"option of {group}")
    if found := _AMBIGUOUS.search(str(error)):
        key, value = found.groups()
        told = for_shell(f"{key}={_quoted(value)}")
        return (
            f"{key}={value} may be a list, text or a sweep: write {key}=[{value}], or {told}, or sweep over it with -m"
        )
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OmegaConfBaseException) and cause.full_key is not None):
        cause = cause.__cause__
    if isinstance(cause, OmegaConfBaseException):
        return _of_key(cause)
    return harmless(redacted(one_line(error)))


def _unreadable(override: str) -> str:
    """Say of an argument that is not of Hydra's grammar how a shell is told what it sets."""
    key, _, value = override.partition("=")
    if value[:1] in ("'", '"') and value[-1:] == value[:1] and value[1:]:
        value = value[1:-1]  # it is what is inside that ended the quotes too early
    try:
        OverridesParser.create().parse_override(f"{key}=0")
    except HydraException:
        return f"{override!r} cannot be read: {key!r} is no key"
    found = _LIST.fullmatch(value)
    items = re.split(r"\s*,\s*", found[1].strip()) if found else [value]
    signs = " ".join(repr(sign)[1:-1] for sign in dict.fromkeys(_PLAIN.sub("", "".join(items))))
    quoted = [_quoted(item) if not found or _PLAIN.sub("", item) else item for item in items]
    told = f"{key}=[{','.join(quoted)}]" if found else f"{key}={quoted[0]}"
    return (
        f"{override!r} cannot be read: text with {signs} needs quotes of its own inside the shell's: {for_shell(told)}"
    )


def _quoted(text: str) -> str:
    """Return text in quotes, as Hydra reads it."""
    return str(QuotedString(text, Quote.single if '"' in text else Quote.double).with_quotes())


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

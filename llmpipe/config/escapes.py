r"""Backslash escapes in text that a person types on the command line, such as `'sampling.stop=["\n"]'`.

Hydra hands them on as they are typed. They are read where a run's config is made, and the arguments stay as they are,
so that nothing is read twice when a run is resumed. What stands in YAML files was read by YAML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from llmpipe.exceptions import LLMConfigError

KEYS = ("sampling.stop", "prompt.template", "prompt.system")
r"""Keys whose text is meant for the model. In any other key a backslash is a backslash, as in `C:\new`."""
MEANINGS = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'"}
_ESCAPE = re.compile(r"""(?:\\u[0-9a-fA-F]{4})+|\\([ntr\\"'])""")
_AMBIGUOUS = re.compile(r"\\[ntr]")


def read_escapes(composed: Any, overrides: Sequence[str]) -> None:
    r"""Put what the escapes inside of quotes mean into a composed config: `\n`, `\t`, `\r`, `\\`, quotes, `\u00e9`.

    Args:
        composed: What Hydra has made of the overrides.
        overrides: As they were typed.

    Raises:
        LLMConfigError: there are some outside of quotes, where Hydra's rules for backslashes are others.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    for text in overrides:
        if "\\" not in text or text.lstrip("+").partition("=")[0] not in KEYS:
            continue
        override = OverridesParser.create().parse_override(text)
        OmegaConf.update(composed, override.key_or_group, _meant(override._value, override.key_or_group))


def unescaped(text: str) -> str:
    """Return a text in which escapes are what they mean, and other backslashes are as they were."""
    return _ESCAPE.sub(lambda match: MEANINGS[match[1]] if match[1] else json.loads(f'"{match[0]}"'), text)


def as_override(key: str, value: str | list[str]) -> str:
    """Return an override that sets a key to text, or to a list of texts, whatever they hold."""
    from hydra.core.override_parser.types import Quote, QuotedString

    texts = [QuotedString(text, Quote.single).with_quotes() for text in ([value] if isinstance(value, str) else value)]
    return f"{key}={texts[0] if isinstance(value, str) else '[' + ','.join(texts) + ']'}"


def text_of(override: str) -> str:
    """Return what an override sets its key to as Hydra has it: without the quotes, where there are some."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    value = override.partition("=")[2]
    if value[:1] in ("'", '"') and value[:1] == value[-1:]:
        with suppress(HydraException):  # else somebody will say what is wrong
            parsed = OverridesParser.create().parse_override(override).value()
            return parsed if isinstance(parsed, str) else value
    return value


def _meant(value: Any, key: str) -> Any:
    """Return a value of Hydra's parser as a plain one."""
    from hydra.core.override_parser.types import QuotedString

    if isinstance(value, QuotedString):  # as it was typed: Hydra has taken some backslashes before quotes
        return unescaped(value.with_quotes()[1:-1])
    if isinstance(value, Mapping):
        return {_meant(name, key): _meant(inner, key) for name, inner in value.items()}
    if isinstance(value, list):
        return [_meant(inner, key) for inner in value]
    if isinstance(value, str) and (found := _AMBIGUOUS.search(value)):
        quoted = '["{}"]' if key == "sampling.stop" else '"{}"'
        one, two = (f"'{key}={quoted.format(text)}'" for text in (found[0], f"\\{found[0]}"))
        raise LLMConfigError(
            f"{key} has {found[0]} outside of quotes: write {one} for what it stands for, or {two} for two characters"
        )
    return value

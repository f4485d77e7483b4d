"""Keys that were commands before there were verbs: each is refused with the command that does the same now."""

from __future__ import annotations

import os
from collections.abc import Sequence

from llmpipe.config.escapes import text_of
from llmpipe.config.trust import key_of
from llmpipe.exceptions import LLMConfigError
from llmpipe.quoting import shell_command
from llmpipe.verbs import VERBS

KEYS = ("resume", "plan", "export", "export_to", "export_force")
OFF = ("", "null", "false", "no", "off", "0")


def refuse_former(settings: Sequence[str], arguments: Sequence[str]) -> None:
    """Refuse the former keys.

    Args:
        settings: What may be one of them.
        arguments: The whole command.

    Raises:
        LLMConfigError: says the command to use.
    """
    former = [text for text in settings if key_of(text) in KEYS]
    if not former:
        return
    asked = [text for text in former if not text.startswith("~")]
    value = {key_of(text): value for text in asked if (value := _value(text)).lower() not in OFF}
    rest = [text for text in arguments if text not in former]
    if {"export", "plan", "resume"} & value.keys():
        rest = [text for text in rest if text not in VERBS]
    if "export" in value:
        rest = ["export", value["export"], *rest]
    elif "plan" in value:
        rest = ["plan", *rest, *([f"hydra.run.dir={value['resume']}"] if "resume" in value else [])]
    elif "resume" in value:
        rest = ["resume", value["resume"], *rest]
    rest += ["--to", value["export_to"]] if "export_to" in value else []
    rest += ["--force"] if "export_force" in value else []
    keys = dict.fromkeys(f"{key_of(text)}=" for text in former)
    raise LLMConfigError(f"{' and '.join(keys)} gave way to verbs; the command is now: {shell_command(*rest)}")


def _value(setting: str) -> str:
    """Return a value; the name of a directory that is there needed no quotes of Hydra's."""
    typed = setting.partition("=")[2]
    return typed if os.path.lexists(typed) else text_of(setting)

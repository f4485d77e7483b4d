"""The arguments that a run is composed from, as its directory keeps them for `resume=` and `export=`.

A directory may be from somebody else, whose ledger says anything. So what is replayed is a list of what describes a
run. Everything else has to be given again: Hydra's own configuration, where config files are, what is trusted, and what
would read the environment. That a run can be resumed all the same, what a person's own config files said is noted, and
not where they were.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from llmpipe.config import BACKENDS, conf_dir
from llmpipe.config.escapes import KEYS, unescaped
from llmpipe.config.trust import DESCRIPTIVE, TAKES_TRUST, VERBS, brings_code, key_of, leaves
from llmpipe.exceptions import LedgerError
from llmpipe.ledger import saved_arguments
from llmpipe.records import harmless

_WRITES = ("backend.offload_folder",)
_REFERENCE = re.compile(r"\$\{([\w.]+|llmpipe\.data:[\w.-]+)\}")
"""A reference to another key, or to an example dataset; any other asks something outside of the configuration."""


def replayed(directory: Path, given: Sequence[str]) -> list[str]:
    """Return the arguments of the run in a directory that the given ones do not replace.

    Raises:
        LedgerError: the directory holds no run, or one with arguments that a directory cannot give.
    """
    names = {key_of(argument) for argument in given}
    before = [text for text in saved_arguments(directory) if not _replaced(text, names)]
    if refused := [text for text in before if not _describes_a_run(text)]:
        raise LedgerError(
            f"the run in {directory} was begun with {harmless(shlex.join(refused))}, which is not taken from a run "
            f"directory, as that may be from somebody else: if you trust it, give it again beside the directory"
        )
    if any(text.startswith("++backend.") for text in before) and "backend" not in names | set(map(key_of, before)):
        return ["~backend", *before]  # someone else's, with no options but its own
    return before


def composed_from(composed: DictConfig, job: Any) -> list[str]:
    """Return the arguments that compose the running job again, from llmpipe's own config files alone.

    Args:
        composed: The job's configuration, without Hydra's node.
        job: That node.
    """
    files = {source.path for source in job.runtime.config_sources if source.schema != "structured"}
    if files <= {"hydra.conf", str(conf_dir())} and job.job.config_name == "config":
        return [text for text in typed(job) if key_of(text) not in VERBS]
    schema = OmegaConf.get_type(composed, "backend")
    return [
        *(f"backend={backend.group}" for backend, known in BACKENDS.items() if schema is known),
        *_written_out(composed),
    ]


def typed(job: Any) -> list[str]:
    """Return the overrides of a job as they were typed; what is read one by one, OmegaConf resolves.

    Args:
        job: The job's node of Hydra's.
    """
    return cast(list[str], OmegaConf.to_container(job.overrides.task, resolve=False))


def _written_out(node: DictConfig, path: str = "") -> Iterator[str]:
    """Yield an override for each option of a configuration."""
    values = OmegaConf.to_container(node, resolve=False, throw_on_missing=False, enum_to_str=True)
    assert isinstance(values, dict)
    for name, value in values.items():
        key, inner = f"{path}{name!s}", node._get_node(name)
        if key.partition(".")[0] not in DESCRIPTIVE or value == "???":
            continue
        if isinstance(inner, DictConfig) and (not path or is_dataclass(OmegaConf.get_type(inner))):
            yield from _written_out(inner, f"{key}.")
        else:
            yield f"++{key}={Override._get_value_element_as_str(_quoted(value, key in KEYS))}"


def _quoted(value: Any, escaped: bool) -> Any:
    """Return a value with its texts in quotes, for Hydra's grammar; and for escapes to be read, where they are."""
    if isinstance(value, dict):
        return {_quoted(name, escaped): _quoted(inner, escaped) for name, inner in value.items()}
    if isinstance(value, list):
        return [_quoted(inner, escaped) for inner in value]
    if not isinstance(value, str):
        return value
    return QuotedString(value.replace("\\", "\\u005c") if escaped else value, Quote.double)


def _replaced(text: str, names: set[str]) -> bool:
    """Say whether given arguments of these keys stand for a noted one: of its key, or the group of one written out."""
    key = key_of(text)
    return key in names or (text.startswith("++") and key.partition(".")[0] in names)


def _describes_a_run(argument: str) -> bool:
    """Say whether an argument sets a key, or chooses a group, of what describes a run, and asks for nothing else."""
    if argument.startswith("-"):
        return False
    override = OverridesParser.create().parse_override(argument)
    group = re.split(r"[./]", override.key_or_group)
    if override.is_delete() or override.is_sweep_override() or override.package or group[0] not in DESCRIPTIVE:
        return False
    found = list(leaves(override.value(), tuple(group)))
    texts = [unescaped(argument), *(text for path, value in found for text in (*path, value) if isinstance(text, str))]
    return not any("${" in _REFERENCE.sub("", text) for text in texts) and not any(
        key in _WRITES or (key in TAKES_TRUST and brings_code(value))
        for key, value in ((".".join(path), value) for path, value in found)
    )

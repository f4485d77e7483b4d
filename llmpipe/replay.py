"""The arguments that a run is composed from, as its directory keeps them.

A directory may be from somebody else, whose ledger says anything. So what is replayed is a list of what describes a
run. Everything else has to be given again: Hydra's own configuration, where config files are, what is trusted, and what
would read the environment. That a run can be resumed all the same, what a person's own config files said is noted, and
not where they were.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from llmpipe.config import BACKENDS, BUNDLED, conf_dir
from llmpipe.config.escapes import as_override, unescaped
from llmpipe.config.trust import DESCRIPTIVE, TAKES_TRUST, brings_code, key_of, leaves
from llmpipe.exceptions import LedgerError
from llmpipe.ledger import saved, saved_arguments
from llmpipe.text import harmless

GROUP, OPTION = "written_out", "run"
"""The config group, and its one option, under which Hydra is given a run that was noted as values."""
MOST_LEVELS = 50
"""How deep values from a run directory may nest, because Hydra and OmegaConf walk them by recursion."""
_FILES = ("dataset.path", "prompt.tools", "backend.model", "backend.chat_template", "backend.lora")
"""Keys that may name files, from the working directory of the run."""
_WRITES = ("backend.offload_folder",)
_REFERENCE = re.compile(r"\$\{([\w.]+|llmpipe\.data:[\w.-]+)\}")
"""A reference to another key, or to an example dataset; any other asks something outside of the configuration."""


def composed_from(composed: DictConfig, job: Any) -> list[str]:
    """Return what composes the running job again: its overrides, or, where config files are a person's own, all values.

    Args:
        composed: The job's configuration, without Hydra's node.
        job: That node.
    """
    overrides = typed(job)
    files = {source.path for source in job.runtime.config_sources if source.schema != "structured"}
    own = files <= {"hydra.conf", str(conf_dir())} and job.job.config_name == "config"
    if own and GROUP not in map(key_of, overrides):
        return overrides
    values: Any = OmegaConf.to_container(composed, resolve=False, throw_on_missing=False, enum_to_str=True)
    schema = OmegaConf.get_type(composed, "backend")
    groups = [f"backend={backend.group}" for backend, known in BACKENDS.items() if schema is known]
    return [*groups, json.dumps({name: value for name, value in values.items() if name in DESCRIPTIVE})]


def typed(job: Any) -> list[str]:
    """Return the overrides of a job as they were typed; what is read one by one, OmegaConf resolves.

    Args:
        job: The job's node of Hydra's.
    """
    return cast(list[str], OmegaConf.to_container(job.overrides.task, resolve=False))


def replayed(directory: Path, given: Sequence[str]) -> list[str]:
    """Return the arguments of the run in a directory that the given ones do not replace.

    Files are named as they are found from where the run was begun; those that are not there, as they were.

    Raises:
        LedgerError: the directory holds no run, or one with arguments that a directory cannot give.
    """
    names = {key_of(argument) for argument in given}
    before: list[str] = []
    refused: list[str] = []
    (there,) = saved(directory, "working_directory")
    there = there if isinstance(there, str) and os.path.isabs(there) else os.getcwd()
    for text in saved_arguments(directory):
        if text.startswith("{"):
            values = _without(_read(text), names)
            wrong = [f"{'.'.join(path)}={value}" for path, value in leaves(values) if not _may_be(path, value)]
            if not wrong:
                find_files(values, there)
                ConfigStore.instance().store(OPTION, values, group=GROUP, package="_global_")
            refused += wrong
            before += [] if "backend" in {*names, *map(key_of, before)} else ["~backend"]
            before.append(f"+{GROUP}={OPTION}")
        elif key_of(text) not in names:
            describes = _describes_a_run(text)
            before.append(with_files(text, there) if describes else text)
            refused += [] if describes else [text]
    if refused:
        shown = textwrap.shorten(harmless(shlex.join(refused)), 2000)
        raise LedgerError(
            f"the run in {directory} was begun with {shown}, which is not taken from a run directory, as that may be "
            f"from somebody else: if you trust it, give it again beside the directory"
        )
    return before


def _read(text: str) -> dict[str, Any]:
    """Return the values that a run was noted as."""
    try:
        values = json.loads(text)
        list(leaves(values))
    except (ValueError, RecursionError):
        values = None
    return values if isinstance(values, dict) else {text: None}


def _without(values: dict[str, Any], names: Iterable[str], path: str = "") -> dict[str, Any]:
    """Return values without those of some keys."""
    kept = {name: value for name, value in values.items() if f"{path}{name}" not in names}
    return {n: _without(v, names, f"{path}{n}.") if isinstance(v, dict) else v for n, v in kept.items()}


def find_files(values: dict[str, Any], there: str) -> None:
    """Name, in the values of a configuration, files as they can be found from here.

    Args:
        values: By group; those of a group are a map or a dataclass, and are changed.
        there: The directory from which they were named.
    """
    for key in _FILES:
        group, _, name = key.partition(".")
        options: Any = values.get(group)
        options = vars(options) if is_dataclass(options) else options
        if isinstance(options, dict) and name in options:
            options[name] = _found(options[name], there)


def with_files(argument: str, there: str) -> str:
    """Return an argument, or values, of a run, that name files as they can be found from here."""
    if argument.startswith("{"):
        find_files(values := json.loads(argument), there)
        return json.dumps(values)
    if key_of(argument) not in _FILES:
        return argument
    value = OverridesParser.create().parse_override(argument).value()
    found = _found(value, there)
    return argument if found == value else as_override(argument.partition("=")[0], cast(Any, found))


def _found(value: Any, there: str) -> Any:
    """Return what names a file, or files, with the way to them where they are there."""
    if isinstance(value, list):
        return [_found(one, there) for one in value]
    if not isinstance(value, str) or "\0" in value or value == BUNDLED or there == os.getcwd():
        return value
    path = os.path.join(there, value)
    return path if _is_file(path) else value


def _is_file(text: str) -> bool:
    """Say whether a text names a file or a directory, or finds one; an adapter's scale may stand behind it."""
    names = (text, text.rpartition("=")[0])
    return any(name and (os.path.lexists(name) or any(glob.iglob(name, recursive=True))) for name in names)


def _describes_a_run(argument: str) -> bool:
    """Say whether an argument only describes a run: it sets a `DESCRIPTIVE` key, or chooses such a group."""
    if argument.startswith("-"):
        return False
    try:
        override = OverridesParser.create().parse_override(argument)
    except RecursionError:
        return False
    names, value = override.key_or_group.split("."), override.value()
    if override.is_delete() or override.is_sweep_override() or override.package or _asks(unescaped(argument)):
        return False
    options = {file.stem for file in (conf_dir() / names[0]).glob("*.yaml")} if names[0] in DESCRIPTIVE else set()
    if len(names) == 1 and options and not isinstance(value, dict):  # else it sets the group's keys
        return all(
            isinstance(option, str) and option in options for option in (value if isinstance(value, list) else [value])
        )
    return all(_may_be(*leaf) for leaf in leaves(value, tuple(names)))


def _may_be(path: tuple[str, ...], value: Any) -> bool:
    """Say whether a run directory may set a key to a value."""
    if not path:  # there are no keys at all
        return True
    key = ".".join(path)
    asks = any(_asks(text) for text in (*path, value) if isinstance(text, str))
    runs_code = key in TAKES_TRUST and brings_code(value)
    return path[0] in DESCRIPTIVE and len(path) <= MOST_LEVELS and not (asks or runs_code or key in _WRITES)


def _asks(text: str) -> bool:
    """Say whether a text has references that ask something outside of the configuration, such as the environment."""
    return "${" in _REFERENCE.sub("", text)

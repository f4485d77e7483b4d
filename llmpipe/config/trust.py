"""Whose code a configuration may run, and what may be said by whom. It composes nothing and imports none of that code.

A person says what to trust on the command line, or in the primary config file. A config group, a sweep's parameters and
a run directory may be from somebody else, and may only describe a run. Hydra calls what its own nodes name (callbacks,
launchers, sweepers, loggers) before any job begins, so they are looked at when a configuration has been composed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from llmpipe.config.backends import BACKENDS
from llmpipe.config.checks import check
from llmpipe.exceptions import LLMConfigError

DESCRIPTIVE = (
    *("backend", "device", "sampling", "dataset", "prompt", "output", "metrics", "experiment"),
    *("seed", "on_error", "max_error_rate", "run_timeout_s"),
)
"""First names of the keys and groups that describe a run, rather than whom it trusts."""
TRUST = "trusted_modules"
TAKES_TRUST = frozenset(
    f"backend.{f.name}" for schema in BACKENDS.values() for f in fields(schema) if f.metadata.get("takes_trust")
)
"""Options with which a model brings code of its own."""

_KNOWN = {
    "launcher": re.compile(
        r"hydra\._internal\.core_plugins\.basic_launcher\.BasicLauncher"
        r"|hydra_plugins\.hydra_(joblib|submitit|ray|rq)_launcher\.\w+_launcher\.[A-Z]\w*Launcher"
    ),
    "sweeper": re.compile(
        r"hydra\._internal\.core_plugins\.basic_sweeper\.BasicSweeper"
        r"|hydra_plugins\.hydra_(optuna|ax|nevergrad)_sweeper\.\w+_sweeper\.[A-Z]\w*Sweeper"
        r"|optuna\.(samplers|pruners)\.[A-Z]\w*"
    ),
    "callbacks": re.compile(r"hydra\.experimental\.callbacks\.[A-Z]\w*Callback"),
    "job_logging": re.compile(
        r"(logging|logging\.handlers|colorlog)\.[A-Z]\w*|llmpipe\.terminal\.Terminal(Formatter|Handler)|queue\.\w*Queue"
    ),
}
"""What Hydra's nodes may name without trust: whole paths, so that no module is reached through what another imports."""
_LOGGING = ("job_logging", "hydra_logging")
_KNOWN["hydra_logging"] = _KNOWN["job_logging"]
_CALLED = ("_target_", "()", "class", "queue", "listener")
"""Keys whose text Hydra, or Python's logging, imports and calls; all but the first in the configuration of logging."""
_STREAMS = ("sys.stdout", "sys.stderr")

_OF_GROUPS = ("run", "sweep", "mode", "verbose", "launcher", "sweeper", "callbacks", *_LOGGING)
"""Nodes of Hydra's own configuration that a group may set, besides the job's name."""
_REFERENCE = re.compile(r"\$\{hydra[.:](runtime|job|run|sweep)\.\w+\}")
_RUN_DIR, _JOB_NAME = "${hydra.runtime.output_dir}", "${hydra.job.name}"
_LOG_FILE = re.compile(r"(?!\.)[\w .-]+\.log")
_TEXTS = {"_target_", "params", "search_space", "direction", "study_name", "optimizer", "seed", "backend", "prefer"}
_TEXTS |= {"require", "pre_dispatch", "batch_size", "max_nbytes", "mmap_mode", "partition", "qos", "account", "name"}
_TEXTS |= {"comment", "constraint", "gres", "mem_per_gpu", "mem_per_cpu"}
"""Parameters of launchers and sweepers whose text is no command, no function's name and no address."""

_RUNNER = ("backend", "_target_")
"""The one target that only llmpipe itself calls; it is checked when all else has been settled."""

Leaf = tuple[tuple[str, ...], Any]


def check_composed(values: Mapping[str, Any], trusted: Sequence[str]) -> None:
    """Refuse a composed configuration that names code which nobody trusts.

    Args:
        values: The configuration, Hydra's own nodes included, its interpolations as they are written.
        trusted: Modules that are trusted.

    Raises:
        LLMConfigError: names the key, and says how to trust the code.
    """
    for path, value in leaves(values):
        key, node = ".".join(path), path[1] if path[0] == "hydra" and len(path) > 1 else ""
        text = value if isinstance(value, str) else ""
        if "_target_" in path or (node in _LOGGING and path[-1] in _CALLED and isinstance(value, str)):
            known = _KNOWN.get(node)
            if path != _RUNNER and (known is None or not known.fullmatch(text)):
                check_trusted(text, trusted, key, ours=False)
        elif node in _LOGGING and text.startswith(("ext://", "cfg://")):
            name = text.removeprefix("ext://")
            if name not in _STREAMS:
                check_trusted(name, trusted, key)


def is_own(path: object) -> bool:
    """Say whether an import path, such as a class's `__module__`, is one of llmpipe's own."""
    return str(path).partition(".")[0] == "llmpipe"


def check_trusted(target: str, trusted: Sequence[str], key: str = "backend._target_", ours: bool = True) -> None:
    """Refuse a target whose module is not trusted.

    Args:
        target: An import path.
        trusted: Modules that are trusted.
        key: Where the path stands.
        ours: Whether llmpipe's own code may be named there.

    Raises:
        LLMConfigError: says how to trust it.
    """
    module = target.rpartition(".")[0]
    if not re.fullmatch(r"[\w.]+", module):
        raise LLMConfigError(f"{key}={target!r} is not allowed; it must be MODULE.CLASS")
    if not (ours and is_own(module)) and not any(f"{module}.".startswith(f"{name}.") for name in trusted):
        where = "outside llmpipe" if ours else "code"
        raise LLMConfigError(
            f"{key}={target!r} is {where} and not trusted: "
            f"if you trust its code, add trusted_modules=[{module}] to the command or to your primary config"
        )


def check_group(values: Mapping[str, Any], file: str) -> None:
    """Refuse a config file that says of Hydra more than a group needs to say: it may be from somebody else.

    Args:
        values: What the file sets, by its full name, its interpolations as they are written.
        file: What the file is called.

    Raises:
        LLMConfigError: names the key, and says where it may stand.
    """
    for path, value in leaves(values["hydra"]) if "hydra" in values else ():
        if not _is_harmless(path, value):
            key = ".".join(("hydra", *path))
            raise LLMConfigError(
                f"{file} sets {key}={value!r}, which is not for a config group to set: it could run code. "
                f"If you trust it, set it on the command line or in your primary config"
            )


def _is_harmless(path: tuple[str, ...], value: Any) -> bool:
    """Say whether a group may set a key of Hydra's to a value; what `check_composed` looks at is left to it."""
    text = value if isinstance(value, str) else ""
    if path == ("job", "name"):
        return re.fullmatch(r"[\w.-]+", text) is not None
    if not path or path[0] not in _OF_GROUPS:
        return False
    if path[0] in ("run", "sweep"):
        return True
    if path[0] in _LOGGING:
        return _is_harmless_in_logging(path, text)
    if "${" in _REFERENCE.sub("", text):  # it could become anything after it was looked at
        return False
    if path[0] not in ("launcher", "sweeper"):
        return True
    # Slurm's launcher writes names and texts into the comments of a script, which a line break would end.
    return all(map(str.isprintable, (*path, text))) and (not text or not _TEXTS.isdisjoint(path))


def _is_harmless_in_logging(path: tuple[str, ...], text: str) -> bool:
    """Say whether a group may set a key of the loggers' to a text: it may go on with a log in the run directory."""
    if path[-1] == "filename":
        directory, _, name = text.rpartition("/")
        return directory == _RUN_DIR and _LOG_FILE.fullmatch(name.replace(_JOB_NAME, "x")) is not None
    if path[-1] == "mode":
        return text == "a"
    rest = text.replace(_RUN_DIR, "").replace(_JOB_NAME, "")
    refers = rest != text
    # What a reference stands for must not complete an ext:// or cfg://.
    return "." not in path and "${" not in rest and not (refers and ":/" in rest)


def leaves(values: Any, path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """Yield every value that is no map and no list, or an empty one, with the names that lead to it."""
    items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else ()
    inner = [(str(name), value) for name, value in items]
    if not inner:
        yield path, values
    for name, value in inner:
        yield from leaves(value, (*path, name))


def check_options(backend: Any, is_said: Callable[[str, Any], bool]) -> None:
    """Refuse a backend's options that run code of a model, unless a person has asked for them.

    Args:
        backend: A backend's config.
        is_said: Says whether the command line or the primary config sets a key to a value.

    Raises:
        LLMConfigError: names the option, and says where it may stand.
    """
    for field in fields(backend) if is_dataclass(backend) else ():
        key, value = f"backend.{field.name}", getattr(backend, field.name)
        if key in TAKES_TRUST and brings_code(value) and not is_said(key, value):
            raise LLMConfigError(
                f"{key}={value} is not for a config group to set: it runs code that comes with a model. "
                f"If you trust the model, set it on the command line or in your primary config"
            )


def brings_code(value: Any) -> bool:
    """Say whether an option that takes trust is on, or names code on the hub as OWNER/NAME."""
    return "/" in value if isinstance(value, str) else bool(value)


def key_of(override: str) -> str:
    """Return the key, or the group, of an override as it is typed."""
    return override.partition("=")[0].lstrip("+~")


def is_said_by_user(
    key: str, value: Any, overrides: Sequence[str], config_name: str | None, sources: Sequence[Any]
) -> bool:
    """Say whether the command line, which has the last word, or the primary config file itself sets a key to a value.

    What the primary config says need not be what was composed: groups chosen on the command line may stand above it.

    Args:
        key: The key.
        value: What was composed of it.
        overrides: As in `said_by_user`.
        config_name: As in `said_by_user`.
        sources: As in `said_by_user`.
    """
    if key in map(key_of, overrides):
        return True
    said = said_by_user(key, (), config_name, sources)
    return said == value or str(said).lower() == str(value).lower()  # the environment's true is text


def said_by_user(key: str, overrides: Sequence[str], config_name: str | None, sources: Sequence[Any]) -> Any:
    """Return what the command line, or else the primary config file itself, says of a key; None where neither does.

    Args:
        key: The key.
        overrides: Those that a person typed.
        config_name: The primary config's.
        sources: Hydra's, in the order in which files are looked for.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    for override in reversed(overrides):
        if key_of(override) == key:
            return OverridesParser.create().parse_override(override).value()
    for source in sources if config_name else ():
        primary = Path(source.path) / f"{str(config_name).removesuffix('.yaml')}.yaml"
        if source.schema == "file" and primary.is_file():
            return OmegaConf.select(OmegaConf.load(primary), key)
    return None


def trusted_modules(overrides: Sequence[str], config_name: str | None, sources: Sequence[Any]) -> list[str]:
    """Return what the command line, or else the primary config file itself, trusts.

    A config group must not be able to trust what it names, so the composed value is not asked.

    Raises:
        LLMConfigError: it is no list of modules.
    """
    said = said_by_user(TRUST, overrides, config_name, sources)
    names = [] if said is None else list(said) if isinstance(said, Sequence) and not isinstance(said, str) else said
    is_list = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    check(is_list, TRUST, said, "a list of modules, such as trusted_modules=[mine]")
    return list(names)

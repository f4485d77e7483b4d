"""Hydra's loader of configurations, which refuses code that nobody trusts before Hydra calls any of it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra._internal.hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from llmpipe.config.checks import check
from llmpipe.config.directories import conf_dir
from llmpipe.config.references import references_of
from llmpipe.config.run import RunConfig
from llmpipe.config.trust import DESCRIPTIVE, TAKES_TRUST, check_composed, check_group, key_of, leaves, trusted_modules
from llmpipe.exceptions import LLMConfigError, LLMError
from llmpipe.system.links import check_link

_TRUSTED_PLACES = ("structured:", "pkg://hydra.", "pkg://hydra_plugins.")
"""Where config files need no trust: those that Python code has registered, and Hydra's and its plugins' own."""

_SWEPT = ("params", "search_space", "parametrization")
"""Keys of sweepers that say what to sweep over."""
_KEYS = {"hydra", *(field.name for field in fields(RunConfig))}
"""First names of the keys that a composed configuration has."""


class CheckedLoader(ConfigLoaderImpl):
    """Looks at each config file that is loaded, and at what has been composed of them."""

    def load_configuration(
        self, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any
    ) -> DictConfig:
        """Compose a configuration.

        Raises:
            LLMConfigError: it names code that is not trusted, or a group says what only a person may say; or it sweeps
                over what the environment has.
            LLMError: where Hydra would write a sweep's configuration is a link, or another program's file.
        """
        try:
            composed = super().load_configuration(config_name, overrides, *args, **kwargs)
        except (ValueError, YAMLError) as error:
            if isinstance(error, LLMConfigError):
                raise
            raise LLMConfigError(f"cannot read a configuration: {error}") from error
        trusted = trusted_modules(overrides, config_name, composed.hydra.runtime.config_sources)
        written = _written(composed)
        check_composed(written, trusted)
        # Where Hydra only asks for the mode, it takes a refusal for a run that is no sweep.
        if composed.hydra.mode is RunMode.MULTIRUN and kwargs.get("validate_sweep_overrides", True):
            _check_sweep(composed.hydra, written["hydra"])
            with suppress(OmegaConfBaseException):  # Hydra will say what is wrong with it
                multirun = Path(composed.hydra.sweep.dir) / "multirun.yaml"  # before there is a job that looks there
                check_link(multirun)
                check_configs(multirun)
        return composed

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """Compose the configuration of one job of a sweep.

        Raises:
            LLMConfigError: as `load_configuration`; or it was no person who put a key into the sweep.
        """
        typed = {key_of(override) for override in _written(master_config.hydra.overrides.task)}
        for override in OverridesParser.create().parse_overrides(sweep_overrides):
            key = override.key_or_group
            describes = key.replace("/", ".").partition(".")[0] in DESCRIPTIVE and key not in TAKES_TRUST
            check(describes or key in typed, "a sweep over", key, "over what describes a run, or on the command line")
        return super().load_sweep_config(master_config, sweep_overrides)

    def _load_single_config(self, default: Any, repo: Any) -> Any:
        loaded = super()._load_single_config(default, repo)
        own = loaded.path.startswith(_TRUSTED_PLACES) or loaded.path == f"file://{conf_dir()}"
        if not (own and ".." not in default.config_path) and not default.primary:
            check_group(_written(loaded.config), f"{loaded.path}/{default.config_path}.yaml")
        return loaded


def _check_sweep(node: Any, written: dict[str, Any]) -> None:
    """Refuse a sweep over what came from the environment: the sweeper resolves it, and writes it as a job's argument.

    Args:
        node: Hydra's node.
        written: The same as plain values.

    Raises:
        LLMConfigError: says how each job reads it by itself.
    """
    for group in ("launcher", "sweeper"):
        for name, raw in (written[group] or {}).items():
            asking = {path: text for path, text in leaves(raw, ("hydra", group, name)) if "oc.env" in str(text)}
            with suppress(OmegaConfBaseException):  # what only a job can tell
                asking |= references_of(node[group], {name: raw}, ("hydra", group))
            for path, text in asking.items() if name in _SWEPT else ():
                check(False, ".".join(path), text, "on the command line: -m 'KEY=${oc.env:ONE},${oc.env:TWO}'")


def _written(config: Any) -> Any:
    """Return a configuration as plain values, its interpolations as they are written."""
    return OmegaConf.to_container(config, resolve=False, throw_on_missing=False)


@contextmanager
def checked() -> Iterator[None]:
    """Have Hydra compose with `CheckedLoader`, and say in a line what is wrong with the loggers that it sets up."""
    home: Any = hydra._internal.hydra
    theirs, home.ConfigLoaderImpl = home.ConfigLoaderImpl, CheckedLoader  # Hydra has no other way to choose it
    try:
        yield
    except Exception as error:
        in_logging = any(frame.name == "configure_log" for frame in traceback.extract_tb(error.__traceback__))
        if not in_logging or isinstance(error, LLMConfigError | OSError):
            raise
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        said = ": ".join(str(why) for why in (error, error.__cause__) if why is not None)
        raise LLMConfigError(
            f"the loggers of hydra/job_logging or hydra/hydra_logging cannot be set up: {said}"
        ) from error
    finally:
        home.ConfigLoaderImpl = theirs


def check_configs(file: Path) -> None:
    """Refuse to let Hydra write a composed config over that of another program.

    Raises:
        LLMError: names the file.
    """
    with suppress(OSError):  # not there, or whoever opens it will say what is wrong
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        # Of a beginning that was killed, any first part is there; its last line may end anywhere.
        if not all(line[:1] in ("", " ", "-") or line.partition(":")[0] in _KEYS for line in lines):
            raise LLMError(f"{file} is another program's, and would be written over: choose another directory")

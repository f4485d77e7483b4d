"""Hydra's loader of configurations, which refuses code that nobody trusts before Hydra calls any of it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hydra._internal.hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from llmpipe.config.checks import check
from llmpipe.config.reading import conf_dir
from llmpipe.config.trust import DESCRIPTIVE, TAKES_TRUST, check_composed, check_group, key_of, trusted_modules
from llmpipe.exceptions import LLMConfigError

_TRUSTED_PLACES = ("structured:", "pkg://hydra.", "pkg://hydra_plugins.")
"""Where what Python code has registered, Hydra and its plugins have their config files."""


class CheckedLoader(ConfigLoaderImpl):
    """Looks at each config file that is loaded, and at what has been composed of them."""

    def load_configuration(
        self, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any
    ) -> DictConfig:
        """Compose a configuration.

        Raises:
            LLMConfigError: it names code that is not trusted, or a group says what only a person may say.
        """
        composed = super().load_configuration(config_name, overrides, *args, **kwargs)
        trusted = trusted_modules(overrides, config_name, composed.hydra.runtime.config_sources)
        check_composed(_written(composed), trusted)
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
        if not in_logging or isinstance(error, LLMConfigError | OSError) or isinstance(error.__cause__, OSError):
            raise
        said = ": ".join(str(why) for why in (error, error.__cause__) if why is not None)
        raise LLMConfigError(
            f"the loggers of hydra/job_logging or hydra/hydra_logging cannot be set up: {said}"
        ) from error
    finally:
        home.ConfigLoaderImpl = theirs

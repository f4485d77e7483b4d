"""YAML files and overrides → `RunConfig`, by Hydra, which is imported only when it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmpipe.config.backends import BACKENDS
from llmpipe.config.run import RunConfig


def compose(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> RunConfig:
    """Compose a run's configuration as the command line does, from the same files.

    Args:
        overrides: As on the command line: `["backend=transformers", "sampling.temperature=0.7"]`.
        config_dir: A directory of further YAML files, as with `--config-dir`.

    Raises:
        LLMConfigError: a value is out of range.
        hydra.errors.HydraException: a key or option does not exist.
    """
    import hydra

    register_schemas()
    extra = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_run_config(hydra.compose("config", [*overrides, *extra]))


def to_run_config(composed: Any) -> RunConfig:
    """Turn Hydra's composed config into dataclasses, checking every value.

    Raises:
        LLMConfigError: a value is out of range.
    """
    from omegaconf import OmegaConf

    config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig)
    return config


def register_schemas() -> None:
    """Tell Hydra the types, `RunConfig` and one schema per backend, and where the example datasets are."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("llmpipe.data", lambda name: str(data_dir() / name), replace=True)
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    for backend, schema in BACKENDS.items():
        store.store(group="schema", name=backend.group, node=schema)


def conf_dir() -> Path:
    """Return the directory of YAML files: beside the package in a checkout, inside it once installed."""
    package = Path(__file__).parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def data_dir() -> Path:
    """Return the directory of the example datasets, found as `conf_dir` finds its own."""
    return conf_dir().parent / "data"

"""YAML files and overrides → `RunConfig`, by Hydra, which is imported only when it is needed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from llmpipe.config.backends import BACKENDS
from llmpipe.config.checks import naming, reject_unknown
from llmpipe.config.directories import conf_dir, data_dir
from llmpipe.config.escapes import read_escapes
from llmpipe.config.references import environment_variable, references_of
from llmpipe.config.run import RunConfig
from llmpipe.config.trust import check_options, is_own, is_said_by_user, trusted_modules
from llmpipe.exceptions import LLMConfigError
from llmpipe.redaction import below

_one_at_a_time = threading.RLock()


def compose(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> RunConfig:
    """Compose a run's configuration as the command line does, from the same files.

    Args:
        overrides: As on the command line: `["backend=transformers", "sampling.temperature=0.7"]`.
        config_dir: A directory of further YAML files, as with `--config-dir`.

    Raises:
        LLMConfigError: a key or option does not exist, or a value is out of range.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from llmpipe.config.loading import checked
    from llmpipe.config.messages import in_words

    extra = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    try:
        with _apart_from_others(), checked(), hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            register_schemas()
            return to_run_config(hydra.compose("config", [*overrides, *extra]), overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise LLMConfigError(in_words(error)) from error


@contextmanager
def _apart_from_others() -> Iterator[None]:
    """Put the global state of Hydra and OmegaConf aside, because the caller may be a Hydra program itself.

    The state is what Hydra was initialised with, the schemas in its store, and the resolvers.
    """
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from omegaconf.basecontainer import BaseContainer

    with _one_at_a_time:
        Plugins.instance()  # they put schemas into the store when they are first imported, and never again
        hydra, store, resolvers = GlobalHydra.instance().hydra, ConfigStore.instance(), BaseContainer._resolvers
        schemas = store.repo
        GlobalHydra.instance().clear()
        store.repo, BaseContainer._resolvers = deepcopy(schemas), dict(resolvers)
        try:
            yield
        finally:
            GlobalHydra.instance().hydra = hydra
            store.repo, BaseContainer._resolvers = schemas, resolvers


def to_run_config(
    composed: Any, overrides: Sequence[str] = (), primary: str | None = None, sources: Sequence[Any] = ()
) -> RunConfig:
    """Turn Hydra's composed config into dataclasses, checking every value.

    The options of a backend that is not llmpipe's stay plain values: the class that `_target_` names knows them.

    Args:
        composed: The config.
        overrides: What it was composed with, for the escapes in it and for what it trusts.
        primary: The name of the primary config, where it is a person's own.
        sources: Where Hydra looks for it.

    Raises:
        LLMConfigError: a key was added that nothing reads, a value is out of range, or code is not trusted.
    """
    from omegaconf import OmegaConf

    read_escapes(composed, overrides)
    target = OmegaConf.select(composed, "backend._target_", default=None)
    foreign = target is not None and not is_own(target)
    _refuse_added_keys(composed, but=["backend"] if foreign else [])
    references = dict(references_of(composed, OmegaConf.to_container(composed, resolve=False)))
    with naming(below(references, "sampling") | references):  # whose checks leave the group out: rows have it, too
        config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig)
    config.trusted_modules = trusted_modules(overrides, primary, sources)
    check_options(config.backend, lambda key, value: is_said_by_user(key, value, overrides, primary, sources))
    if foreign:
        config.backend = OmegaConf.to_container(composed.backend, resolve=True, enum_to_str=True)
    config.references = references
    return config


def _refuse_added_keys(node: Any, path: str = "", but: Sequence[str] = ()) -> None:
    """Refuse what `+key=` has added to a dataclass: it would be read by nobody."""
    from omegaconf import DictConfig, OmegaConf

    if not isinstance(node, DictConfig) or not is_dataclass(schema := OmegaConf.get_type(node)):
        return
    reject_unknown(map(str, node), [f.name for f in fields(schema)], f"key in {path}" if path else "key")
    for name in map(str, node):
        if name not in but and not OmegaConf.is_missing(node, name):
            _refuse_added_keys(node._get_node(name), f"{path}.{name}" if path else name)


def register_schemas() -> None:
    """Tell Hydra the types, `RunConfig` and one schema per backend, and where the example datasets are."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("llmpipe.data", lambda name: str(data_dir() / name), replace=True)
    OmegaConf.register_new_resolver("oc.env", environment_variable, replace=True)
    store = ConfigStore.instance()
    store.store(name="run_schema", node=_schema(RunConfig))
    for backend, schema in BACKENDS.items():
        store.store(group="schema", name=backend.group, node=_schema(schema))


def _schema(cls: type[Any]) -> Any:
    """Return a dataclass as Hydra's schema, less what OmegaConf is stricter in than the dataclass itself."""
    from omegaconf import OmegaConf

    schema = OmegaConf.structured(cls)
    _loosen(schema)
    return schema


def _loosen(node: Any) -> None:
    """Let maps take keys that they do not have yet, and integers be written as 8.0; the dataclasses see to the rest."""
    from omegaconf import AnyNode, DictConfig, IntegerNode, OmegaConf

    for key in node:
        inner = node._get_node(key)
        if isinstance(inner, IntegerNode):
            node._content[key] = AnyNode(inner._value(), key=key, parent=node)
        elif isinstance(inner, DictConfig) and is_dataclass(OmegaConf.get_type(inner)):
            _loosen(inner)
        elif isinstance(inner, DictConfig):
            OmegaConf.set_struct(inner, False)

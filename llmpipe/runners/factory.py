"""Configuration → the runner for it. The one place that knows which backends there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmpipe.config import (
    BACKENDS,
    BackendConfig,
    BackendType,
    BatchingConfig,
    DeviceConfig,
    ModelConfig,
    backend_config,
    build,
    check_trusted,
    describe,
    unknown_name,
)
from llmpipe.exceptions import LLMConfigError
from llmpipe.runners.base import BaseLLMRunner
from llmpipe.runners.isolated import IsolatedRunner
from llmpipe.runners.targets import import_class
from llmpipe.runners.weights import refuse_unreachable


class LLMRunnerFactory:
    """Makes runners from library configurations (`create_runner`) and from composed ones (`from_target`)."""

    _registered: dict[str, type[BaseLLMRunner]] = {}

    @classmethod
    def register(cls, name: str, runner: type[BaseLLMRunner]) -> None:
        """Make `backend=name` mean `runner` for `create_runner`.

        Raises:
            LLMConfigError: the name belongs to a backend of llmpipe.
        """
        if _builtin(name) is not None:
            raise LLMConfigError(f"backend name {name!r} is taken by llmpipe; choose another")
        cls._registered[name] = runner

    @classmethod
    def create_runner(cls, config: Mapping[str, Any] | ModelConfig) -> BaseLLMRunner:
        """Load the model that `config` names.

        Args:
            config: A `ModelConfig`, or a dictionary of its fields and the backend's options, as it is or under `llm`.

        Raises:
            LLMConfigError: a backend or option is unknown, or a value out of range.
            LLMInitializationError: the model or a package is missing, or the device is not there.
        """
        if not isinstance(config, ModelConfig):
            config = ModelConfig.from_dict(config)
        name = str(getattr(config.backend, "value", config.backend))
        builtin = _builtin(name)
        if builtin is not None:
            schema, target = BACKENDS[builtin], BACKENDS[builtin]._target_
        elif name in cls._registered:
            runner = cls._registered[name]
            schema, target = runner.config_type, f"{runner.__module__}.{runner.__qualname__}"
        else:
            names = [backend.value for backend in BackendType] + list(cls._registered)
            raise LLMConfigError(unknown_name(name, names, "backend"))
        if backend_config(config, schema).isolation:  # then nothing of a backend of llmpipe's is imported here
            return IsolatedRunner(target, schema, config)
        if builtin is None:
            return runner(config)
        _refuse_early(schema, config.model_path)
        return import_class(target)(config)

    @classmethod
    def from_target(
        cls,
        backend: BackendConfig | Mapping[str, Any],
        device: DeviceConfig,
        trusted_modules: Sequence[str] = (),
        weights: bool = True,
    ) -> BaseLLMRunner:
        """Load the runner that `backend._target_` names, with the options beside it; with or without the weights.

        Raises:
            LLMConfigError: the target is outside llmpipe and not trusted, cannot be imported, or is no runner.
            LLMInitializationError: the model or a package is missing, or the device is not there.
        """
        values = describe(backend) if isinstance(backend, BackendConfig) else dict(backend)
        target = str(values.get("_target_", "???"))
        check_trusted(target, trusted_modules)
        own = any(type(backend) is schema and target == schema._target_ for schema in BACKENDS.values())
        if isinstance(backend, BackendConfig) and own and weights and backend.isolation:  # nothing of it is needed here
            return IsolatedRunner(target, type(backend), backend, device)
        if isinstance(backend, BackendConfig) and own:
            _refuse_early(type(backend), backend.model)
        runner = import_class(target)
        config = backend if type(backend) is runner.config_type else build(runner.config_type, values, "backend option")
        if weights and config.isolation:
            return IsolatedRunner(target, runner.config_type, config, device)
        return runner(config, device) if weights else runner(config, device, weights=False)


def _refuse_early(schema: type[BackendConfig], model: str) -> None:
    """Refuse a model that cannot be had before the packages of its backend are imported."""
    if issubclass(schema, BatchingConfig):  # the others have no files
        refuse_unreachable(model)


def _builtin(name: str) -> BackendType | None:
    try:
        return BackendType(name)
    except ValueError:
        return None

"""The flat form, for library users: one object that names a model, where it runs, and how it samples by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

from llmpipe.config.backends import BUNDLED, BackendConfig
from llmpipe.config.checks import check, reject_unknown
from llmpipe.config.choices import BackendType, DeviceType
from llmpipe.config.options import option
from llmpipe.config.run import DeviceConfig
from llmpipe.config.sampling import SamplingConfig
from llmpipe.config.values import build
from llmpipe.exceptions import LLMConfigError


@dataclass
class ModelConfig(SamplingConfig):
    """A model and its defaults, flat: the friendly form for library users.

    Sampling options are those of `SamplingConfig`; options of the chosen backend (`threads`, `dtype`, …) go into
    `options`, and in a dictionary configuration beside the others.
    """

    model_path: str = option(BUNDLED, "A local file or directory, a hub id, or `bundled`.")
    backend: BackendType | str = option(
        BackendType.LLAMA_CPP, "A `BackendType`, its name, or a name given to `LLMRunnerFactory.register`."
    )
    device: DeviceType | str = option(DeviceType.AUTO, "A `DeviceType` or its name, such as `cuda` or `cuda:1`.")
    options: dict[str, Any] = option({}, "Options of the backend, as in its config class.")

    def __post_init__(self) -> None:
        """Check sampling and device; the factory checks the backend and its options.

        Raises:
            LLMConfigError: names the option, the value and the bounds.
        """
        self.device = str(DeviceConfig.parse(self.device))
        super().__post_init__()

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read `{"llm": {...}}` or the inner dictionary; what is no field of `ModelConfig` is a backend option.

        Raises:
            LLMConfigError: a value is out of range. Unknown backend options are refused by the factory.
        """
        if not isinstance(config, Mapping):
            example = '{"backend": "llama.cpp", "model_path": "bundled"}'
            raise LLMConfigError(
                f"config={config!r} is not allowed; it must be a ModelConfig or a dictionary, such as {example}"
            )
        flat = config.get("llm", config)
        check(isinstance(flat, Mapping), "llm", flat, "a dictionary of options")
        own = {f.name for f in fields(cls)}
        given = flat.get("options", {})
        check(isinstance(given, Mapping), "options", given, "a dictionary of options")
        options = {**given, **{k: v for k, v in flat.items() if k not in own}}
        return cls(**{**{k: v for k, v in flat.items() if k in own}, "options": options})

    @property
    def sampling(self) -> SamplingConfig:
        """The sampling options alone."""
        return SamplingConfig(**{f.name: getattr(self, f.name) for f in fields(SamplingConfig)})


def backend_config(
    config: BackendConfig | ModelConfig | Mapping[str, Any], config_type: type[BackendConfig]
) -> BackendConfig:
    """Return the options of a backend, in whichever form they come.

    Raises:
        LLMConfigError: an option is unknown, of the wrong type or out of range.
    """
    if isinstance(config, ModelConfig):
        own = [f.name for f in fields(config_type)]
        reject_unknown(config.options, own, "option", extra=[f.name for f in fields(ModelConfig)])
        config = {"model": config.model_path, **config.options}
    if isinstance(config, Mapping):
        config = cast(BackendConfig, build(config_type, config, "backend option"))
    return config

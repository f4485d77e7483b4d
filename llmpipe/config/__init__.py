"""Every option of llmpipe, stated once: its name, type, default, unit, and what it means.

The dataclasses here are the schema of the composed (Hydra) configuration and the fields of the library's flat
`ModelConfig`; the YAML files in `conf/` only choose values. `--help` prints their docs. Ranges are
checked when an object is made, so a bad value is refused before anything is loaded.

This describes. It never touches the network, a device, or a backend's package.

options.py     how an option is stated
choices.py     the options that are a choice from a few names
checks.py      what refuses a wrong value or an unknown name
conversion.py  what makes a value of the type that its option declares
sampling.py    how tokens are chosen
backends.py    the options of each backend
run.py         a whole run: device, dataset, prompt, output, metrics
model.py       the flat form, for library users
values.py      a dataclass made from plain values, and as plain values
escapes.py     backslash escapes in text that is typed on the command line
trust.py       whose code a configuration may run, and what may be said by whom
directories.py where the YAML files and the example datasets are
references.py  which values came from the environment
loading.py     Hydra's loader, with those checks
reading.py     YAML files and overrides → `RunConfig`
messages.py    what Hydra and OmegaConf find wrong → one line
"""

from llmpipe.config.backends import (
    BACKENDS,
    BUNDLED,
    BackendConfig,
    BatchingConfig,
    EchoConfig,
    LlamaCppConfig,
    TransformersConfig,
    split_adapter,
)
from llmpipe.config.checks import auto_or_bool, check, reject_unknown, unknown_name
from llmpipe.config.choices import (
    BackendType,
    Batching,
    CacheType,
    ControlTokens,
    DeviceType,
    Dtype,
    OnError,
    Overflow,
    PromptFormat,
    RopeScaling,
    Switch,
)
from llmpipe.config.directories import conf_dir, data_dir
from llmpipe.config.model import ModelConfig, backend_config
from llmpipe.config.options import field_docs, option
from llmpipe.config.reading import compose, register_schemas, to_run_config
from llmpipe.config.run import (
    ColumnsConfig,
    CsvConfig,
    DatasetConfig,
    DeviceConfig,
    MetricsConfig,
    OutputConfig,
    PromptConfig,
    RunConfig,
)
from llmpipe.config.sampling import MAX_SAMPLES, SamplingConfig, SamplingOptions
from llmpipe.config.trust import check_trusted, is_own
from llmpipe.config.values import answer_fields, build, describe

__all__ = [
    "BACKENDS",
    "BUNDLED",
    "BackendConfig",
    "BackendType",
    "Batching",
    "BatchingConfig",
    "CacheType",
    "ColumnsConfig",
    "ControlTokens",
    "CsvConfig",
    "DatasetConfig",
    "DeviceConfig",
    "DeviceType",
    "Dtype",
    "EchoConfig",
    "LlamaCppConfig",
    "MAX_SAMPLES",
    "MetricsConfig",
    "ModelConfig",
    "OnError",
    "OutputConfig",
    "Overflow",
    "PromptConfig",
    "PromptFormat",
    "RopeScaling",
    "RunConfig",
    "SamplingConfig",
    "SamplingOptions",
    "Switch",
    "TransformersConfig",
    "answer_fields",
    "auto_or_bool",
    "backend_config",
    "build",
    "check",
    "check_trusted",
    "compose",
    "conf_dir",
    "data_dir",
    "describe",
    "field_docs",
    "is_own",
    "option",
    "register_schemas",
    "reject_unknown",
    "split_adapter",
    "to_run_config",
    "unknown_name",
]

"""Every option of llmpipe, stated once: its name, type, default, unit, and what it means.

The dataclasses below are the schema of the composed (Hydra) configuration and the fields of the library's flat
`ModelConfig`; the YAML files in `conf/` only choose values. `--help` prints the strings under the fields. Ranges are
checked when an object is made, so a bad value is refused before anything is loaded.

This file describes. It never touches the network, a device, or a backend's package.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING as REQUIRED
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from llmpipe.exceptions import LLMConfigError

BUNDLED = "bundled"
"""The value of `backend.model` that means the small model shipped with the package."""
MAX_SAMPLES = 4096
"""Most samples of one row; they are held in memory together."""


class BackendType(str, Enum):
    """The backends that come with llmpipe. `llama_cpp` is accepted for `llama.cpp`."""

    LLAMA_CPP = "llama.cpp"
    TRANSFORMERS = "transformers"
    ECHO = "echo"

    @classmethod
    def _missing_(cls, value: object) -> BackendType | None:
        name = str(value).lower().replace("_", ".").replace("-", ".")
        return next((member for member in cls if member.value == name), None)

    @property
    def group(self) -> str:
        """The name of the Hydra option, `backend=...`."""
        return self.value.replace(".", "_")


class DeviceType(str, Enum):
    """Where a model runs. `auto` takes the best device that is there."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    MPS = "mps"


class PromptFormat(str, Enum):
    """What a plain prompt becomes before it reaches the model."""

    auto = "auto"
    """`chat` where the model has a chat template, `raw` where it has none."""
    chat = "chat"
    """A user message under the model's chat template."""
    raw = "raw"
    """The text as it is."""


class Overflow(str, Enum):
    """What happens to a prompt that exceeds the context."""

    error = "error"
    """The row becomes an error row."""
    truncate = "truncate"
    """The prompt loses tokens on the left; `truncated_prompt_tokens` says how many."""


class OutputFormat(str, Enum):
    """The file format of the answers."""

    jsonl = "jsonl"
    parquet = "parquet"


class OnError(str, Enum):
    """What an error row does to its run."""

    quarantine = "quarantine"
    """It goes to `errors.jsonl`, and the run goes on."""
    stop = "stop"
    """It ends the run, which can be resumed."""


class Switch(str, Enum):
    """A choice that the backend may make by itself."""

    auto = "auto"
    on = "on"
    off = "off"


class RopeScaling(str, Enum):
    """How positions beyond those a model was trained for are squeezed into its range."""

    model = "model"
    """As the file says."""
    none = "none"
    linear = "linear"
    yarn = "yarn"


class Batching(str, Enum):
    """How rows share the model."""

    auto = "auto"
    """In slots where the model's attention allows it, else in padded batches."""
    slots = "slots"
    """Rows packed to one sequence, each with a cache of its own; a finished row's slot is filled at once."""
    padded = "padded"
    """Batches of rows of similar length, filled up to the longest."""


class Dtype(str, Enum):
    """Number format of weights and activations."""

    auto = "auto"
    """What the checkpoint says where the device computes it well, float32 elsewhere."""
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def speed(default: Any) -> Any:
    """Declare a field that changes how fast a run is, never what it answers.

    Such fields stay out of a run's fingerprint: a run may be resumed with other values of them.
    """
    return field(default=default, metadata={"speed": True})


def _check(ok: bool, name: str, got: object, allowed: str) -> None:
    if not ok:
        raise LLMConfigError(f"{name}={got!r} is not allowed; it must be {allowed}")


def _number(name: str, value: object, low: float, high: float, allowed: str, *, open_low: bool = False) -> None:
    # Comparisons rather than isfinite, which fails on integers too large for a float; NaN is inside of nothing.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside = is_number and (low < value if open_low else low <= value) and value <= high  # type: ignore[operator]
    _check(bool(inside), name, value, allowed)


def _check_adapters(adapters: Sequence[Any]) -> None:
    for adapter in adapters:
        is_named = isinstance(adapter, str) and bool(split_adapter(adapter)[0])
        _check(is_named, "backend.lora", adapter, "PATH or PATH=SCALE")
        _number(f"the scale in backend.lora={adapter!r}", split_adapter(adapter)[1], -1e6, 1e6, "a finite number")


def split_adapter(text: str) -> tuple[str, float]:
    """Return path and scale of a LoRA adapter written as PATH or PATH=SCALE."""
    name, sign, scale = text.rpartition("=")
    try:
        return (name, float(scale)) if sign else (text, 1.0)
    except ValueError:  # an equals sign in the file's name
        return text, 1.0


def _count(name: str, value: object, low: int, allowed: str) -> None:
    _check(isinstance(value, int) and not isinstance(value, bool) and value >= low, name, value, allowed)


@dataclass
class SamplingConfig:
    """How tokens are chosen. The same option means the same on every backend.

    Logits pass through: logit_bias, repetition_penalty, presence and frequency penalty, temperature, top_k, top_p,
    min_p, typical_p; a token is then drawn from what is left.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token (greedy). In [0, 100]."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities sum to top_p (Holtzman et al. 2020); 1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one (Nguyen et al. 2024); 0 keeps all."""
    typical_p: float = 1.0
    """Keep the locally typical tokens of mass typical_p (Meister et al. 2022); 1 keeps all."""
    repetition_penalty: float = 1.0
    """Divide (multiply where negative) the logits of tokens in prompt and completion (Keskar et al. 2019); 1 is off."""
    presence_penalty: float = 0.0
    """Subtract from the logit of each token already in the completion, as OpenAI defines it. In [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtract once per occurrence of the token in the completion, as OpenAI defines it. In [-2, 2]."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Add to the logits of these token ids."""
    max_tokens: int = 256
    """Most tokens to generate per sample; the end token is not counted."""
    stop: list[str] = field(default_factory=list)
    """Strings that end the completion; they are cut off, also where they span several tokens."""
    n: int = 1
    """Samples per row, each with its own seed."""
    seed: int | None = None
    """Seed of the row itself; by default derived from the run's seed and the row's id."""
    ignore_eos: bool = False
    """Generate max_tokens tokens, end tokens or not (for benchmarks)."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            LLMConfigError: names the option, the value and the bounds.
        """
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        _check(self.stop is None or isinstance(self.stop, Sequence), "stop", self.stop, "a list of non-empty strings")
        self.stop = list(self.stop or [])
        _number("temperature", self.temperature, 0, 100, "a number in [0, 100]")
        _count("top_k", self.top_k, 0, "an integer >= 0 (0 is off)")
        _number("top_p", self.top_p, 0, 1, "a number in (0, 1]", open_low=True)
        _number("min_p", self.min_p, 0, 1, "a number in [0, 1]")
        _number("typical_p", self.typical_p, 0, 1, "a number in (0, 1]", open_low=True)
        _number("repetition_penalty", self.repetition_penalty, 0, 100, "a number in (0, 100]", open_low=True)
        _number("presence_penalty", self.presence_penalty, -2, 2, "a number in [-2, 2]")
        _number("frequency_penalty", self.frequency_penalty, -2, 2, "a number in [-2, 2]")
        _count("max_tokens", self.max_tokens, 1, "an integer >= 1")
        _count("n", self.n, 1, "an integer >= 1")
        _check(self.n <= MAX_SAMPLES, "n", self.n, f"at most {MAX_SAMPLES}")
        _check(all(isinstance(s, str) and s for s in self.stop), "stop", self.stop, "a list of non-empty strings")
        if self.seed is not None:
            _count("seed", self.seed, 0, "an integer >= 0, or null")
        _check(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "true or false")
        _check(isinstance(self.logit_bias, Mapping), "logit_bias", self.logit_bias, "a map of token id to bias")
        try:
            self.logit_bias = {int(token): float(bias) for token, bias in self.logit_bias.items()}
        except (TypeError, ValueError, OverflowError):
            _check(False, "logit_bias", self.logit_bias, "a map of token id to bias")
        for token, bias in self.logit_bias.items():
            _number(f"logit_bias[{token}]", bias, -1e9, 1e9, "a number in [-1e9, 1e9]")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken; logits divided by less than 1e-5 would overflow."""
        return self.temperature < 1e-5

    def replace(self, changes: Mapping[str, Any]) -> SamplingConfig:
        """Return a copy with `changes` applied; unknown names are refused with the nearest valid one.

        Raises:
            LLMConfigError: an option is unknown or out of range.
        """
        own = {f.name: getattr(self, f.name) for f in fields(SamplingConfig)}
        reject_unknown(changes, own, "sampling option")
        return SamplingConfig(**{**own, **changes})


@dataclass
class BackendConfig:
    """What every backend has; one of its own only adds to it."""

    _target_: str = "???"
    """Import path of the runner class; outside llmpipe it must be trusted, see trusted_modules."""
    model: str = BUNDLED
    """A local file or directory, a hub id, or `bundled`."""
    slots: Any = speed("auto")
    """Rows in flight at once: a number, or auto."""
    threads: int | None = speed(None)
    """CPU threads; by default the physical cores."""
    context: int | None = None
    """Most tokens of prompt and completion; by default what it was trained for (llama.cpp: and memory allows)."""
    reproducible: bool = False
    """Give up speed so that a row's answer does not depend on the rows beside it."""
    chat_template: str | None = None
    """A Jinja chat template, or a file that holds one, instead of the model's own."""
    isolation: bool = speed(False)
    """Load the model in a process of its own, so that a row that crashes or hangs it becomes an error row."""
    row_timeout_s: float | None = speed(None)
    """With isolation: seconds without any progress after which the backend hangs, and is started again."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            LLMConfigError: names the option, the value and the bounds.
        """
        _check(
            isinstance(self.model, str) and bool(self.model.strip()),
            "backend.model",
            self.model,
            "a file, directory or hub id",
        )
        if self.slots != "auto":
            _count("backend.slots", self.slots, 1, "an integer >= 1, or auto")
        if self.threads is not None:
            _count("backend.threads", self.threads, 1, "an integer >= 1, or null")
        if self.context is not None:  # a token of the prompt, and one of the completion
            _count("backend.context", self.context, 2, "an integer >= 2, or null")
        _check(isinstance(self.isolation, bool), "backend.isolation", self.isolation, "true or false")
        if self.row_timeout_s is not None:
            _number("backend.row_timeout_s", self.row_timeout_s, 0, 1e9, "a number > 0, or null", open_low=True)
            if not self.isolation:
                raise LLMConfigError("backend.row_timeout_s needs backend.isolation=true")


@dataclass
class BatchingConfig(BackendConfig):
    """What the backends with continuous batching have."""

    batch_tokens: int = speed(2048)
    """Most prompt tokens computed in one call."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            LLMConfigError: names the option, the value and the bounds.
        """
        super().__post_init__()
        _count("backend.batch_tokens", self.batch_tokens, 1, "an integer >= 1")


@dataclass
class LlamaCppConfig(BatchingConfig):
    """GGUF models in process, through llama-cpp-python."""

    _target_: str = "llmpipe.runners.LlamaCppRunner"
    n_gpu_layers: int | None = speed(None)
    """Layers kept on the GPU; by default all where the device is one, else none. -1 is all."""
    main_gpu: int = speed(0)
    """The GPU that holds what is not split."""
    tensor_split: list[float] = field(default_factory=list, metadata={"speed": True})
    """Share of the model per GPU, such as [0.5, 0.5]; by default as memory allows."""
    flash_attention: Switch = Switch.auto
    """Fused attention. Its sums depend on the batch: backend.reproducible turns it off."""
    cache_type_k: str = "f16"
    """Number format of cached keys: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0."""
    cache_type_v: str = "f16"
    """Number format of cached values; quantised ones need flash attention."""
    micro_batch_tokens: int = speed(512)
    """Tokens computed at once inside a call; larger takes more memory."""
    mmap: bool = speed(True)
    """Map the file into memory instead of reading it."""
    mlock: bool = speed(False)
    """Keep the model from being swapped out."""
    lora: list[str] = field(default_factory=list)
    """LoRA adapters in GGUF, each FILE or FILE=SCALE."""
    rope_scaling: RopeScaling = RopeScaling.model
    """model, none, linear or yarn: how contexts longer than trained for are reached."""
    rope_freq_base: float = 0.0
    """RoPE base frequency; 0 is the model's."""
    rope_freq_scale: float = 0.0
    """RoPE frequency scale, such as 0.5 for twice the context; 0 is the model's."""
    yarn_original_context: int = 0
    """Context the model was trained for, for yarn; 0 is the model's."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            LLMConfigError: names the option, the value and the bounds.
        """
        super().__post_init__()
        allowed = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
        for name in ("cache_type_k", "cache_type_v"):
            _check(
                getattr(self, name) in allowed,
                f"backend.{name}",
                getattr(self, name),
                f"one of {', '.join(allowed)}",
            )
        _count("backend.micro_batch_tokens", self.micro_batch_tokens, 1, "an integer >= 1")
        _number("backend.rope_freq_base", self.rope_freq_base, 0, 1e12, "a number >= 0 (0 is the model's)")
        _number("backend.rope_freq_scale", self.rope_freq_scale, 0, 1e6, "a number >= 0 (0 is the model's)")
        _count("backend.yarn_original_context", self.yarn_original_context, 0, "an integer >= 0 (0 is the model's)")
        _check_adapters(self.lora)
        if self.n_gpu_layers is not None:
            _count("backend.n_gpu_layers", self.n_gpu_layers, -1, "an integer >= -1, or null")
        if self.reproducible and self.flash_attention is Switch.on:
            raise LLMConfigError("backend.reproducible=true needs backend.flash_attention=auto or off")


@dataclass
class TransformersConfig(BatchingConfig):
    """Any causal language model of transformers, on PyTorch."""

    _target_: str = "llmpipe.runners.TransformersRunner"
    dtype: Dtype = Dtype.auto
    """Number format of weights and activations."""
    batching: Batching = speed(Batching.auto)
    """auto, slots or padded: how rows share the model."""
    attn_implementation: str | None = None
    """eager, sdpa, flash_attention_2, …: transformers' own attention, in padded batches."""
    compile: bool = speed(False)
    """torch.compile the forward pass; pays off on long runs on a GPU."""
    device_map: str | None = speed(None)
    """Spread the model over GPUs, host memory and disk through accelerate, such as auto; overrides device."""
    max_memory: dict[str, str] = field(default_factory=dict, metadata={"speed": True})
    """Most memory of the weights per device for device_map, such as {0: 20GiB, cpu: 60GiB}."""
    offload_folder: str | None = speed(None)
    """Where device_map puts the weights for which there is no memory."""
    lora: list[str] = field(default_factory=list)
    """LoRA adapters of peft, each DIRECTORY or DIRECTORY=SCALE; merged into the weights."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    local_files_only: bool = False
    """Never ask the hub; use what is in its cache."""
    trust_remote_code: bool = False
    """Run the Python code that a checkpoint brings. Off: such code can do anything."""
    allow_pickle: bool = False
    """Load weights that are not safetensors. Off: unpickling can run code."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            LLMConfigError: names the option, the value and the bounds.
        """
        super().__post_init__()
        _check_adapters(self.lora)


@dataclass
class EchoConfig(BackendConfig):
    """No model: every row is answered with its own prompt, word by word. For trying a dataset and a config."""

    _target_: str = "llmpipe.runners.EchoRunner"
    model: str = speed("none")
    """There is none."""


BACKENDS: dict[BackendType, type[BackendConfig]] = {
    BackendType.LLAMA_CPP: LlamaCppConfig,
    BackendType.TRANSFORMERS: TransformersConfig,
    BackendType.ECHO: EchoConfig,
}


@dataclass
class DeviceConfig:
    """Where the model runs."""

    type: str = "auto"
    """auto, cpu, cuda or mps."""
    index: int | None = None
    """Which of several, as in cuda:1."""

    def __post_init__(self) -> None:
        """Refuse a device that does not exist.

        Raises:
            LLMConfigError: lists the devices there are.
        """
        names = [member.value for member in DeviceType]
        _check(
            self.type in names,
            "device",
            self.type,
            f"one of {', '.join(names)} (cuda:1 picks one of several)",
        )
        if self.index is not None:
            _count("device.index", self.index, 0, "an integer >= 0, or null")

    @classmethod
    def parse(cls, device: DeviceConfig | DeviceType | str | None) -> DeviceConfig:
        """Read `cuda`, `cuda:1`, a `DeviceType`, or None for auto.

        Raises:
            LLMConfigError: the text names no device.
        """
        if isinstance(device, DeviceConfig):
            return device
        text = device.value if isinstance(device, DeviceType) else str(device or "auto").lower()
        kind, _, index = text.partition(":")
        if index and not index.isdecimal():
            _check(False, "device", text, "such as cpu, cuda or cuda:1")
        return cls(type=kind, index=int(index) if index else None)

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


@dataclass
class ColumnsConfig:
    """What the dataset calls its columns. Every other column rides along untouched."""

    id: str = "id"
    """Unique names of the rows; rows without one are called row-0, row-1, … by position."""
    prompt: str = "prompt"
    """Plain prompts."""
    messages: str = "messages"
    """Chats: lists of {role, content}. Used before prompt where a row has both."""
    reference: str = "reference"
    """Right answers, for the scorers."""
    sampling: str = "sampling"
    """Objects of sampling options that override the run's for their row."""


@dataclass
class DatasetConfig:
    """Which rows to run."""

    path: Any = "???"
    """A file, a glob, or a list of them: .jsonl, .csv, .parquet, the first two also with .gz or .zst."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    """What the dataset calls its columns."""
    limit: int | None = None
    """Run only the first rows, this many."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            LLMConfigError: names the option and the value.
        """
        if self.limit is not None:
            _count("dataset.limit", self.limit, 0, "an integer >= 0, or null")

    @property
    def paths(self) -> list[str]:
        """The configured paths or globs as a list."""
        return [str(self.path)] if isinstance(self.path, (str, Path)) else [str(path) for path in self.path]


@dataclass
class PromptConfig:
    """How a row becomes a prompt."""

    format: PromptFormat = PromptFormat.auto
    """auto, chat or raw; says what a plain prompt becomes. Chats are always rendered by the chat template."""
    system: str | None = None
    """A system message put before chats and plain prompts that have none (not with raw)."""
    template: str | None = None
    """Text in which {column} stands for the row's value, instead of the prompt column; {{ and }} are braces."""
    overflow: Overflow = Overflow.error
    """error or truncate a prompt that exceeds the context."""


@dataclass
class OutputConfig:
    """How the answers are written."""

    format: OutputFormat = OutputFormat.jsonl
    """jsonl or parquet."""
    prefix: str = ""
    """Put before the name of every column that llmpipe adds."""


@dataclass
class MetricsConfig:
    """What is measured."""

    scorers: list[str] = field(default_factory=lambda: ["exact_match"])
    """Scores of rows with a reference: exact_match, contains."""
    memory_interval_s: float = 0.05
    """Seconds between two looks at the process's memory."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            LLMConfigError: names the option and the bounds.
        """
        _number("metrics.memory_interval_s", self.memory_interval_s, 0, 60, "a number in (0, 60]", open_low=True)


@dataclass
class RunConfig:
    """A whole run."""

    backend: Any = "???"
    """Which runner, and its options."""
    device: DeviceConfig = field(default_factory=DeviceConfig)
    """Where the model runs."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How tokens are chosen."""
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    """Which rows to run."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """How a row becomes a prompt."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """How the answers are written."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """What is measured."""
    seed: int = 0
    """Seed of the run; every row and sample derives its own from it."""
    on_error: OnError = OnError.quarantine
    """quarantine error rows in errors.jsonl, or stop at the first one; the run can be resumed."""
    max_error_rate: float | None = None
    """End the run, resumable, when more than this share of 100 or more answers (or of all) are errors; null: never."""
    run_timeout_s: float | None = None
    """End the run, resumable, after so many seconds of generating; a row that hangs can only be left if isolated."""
    resume: str | None = None
    """A run directory to continue, with its own configuration."""
    plan: bool = False
    """Check config and dataset without loading weights, and say what a run would do and take."""
    export: str | None = None
    """A run directory, also of a run that is under way or was killed, whose answers so far are written to a file."""
    export_to: str | None = None
    """The file to write them to, .jsonl or .parquet; by default partial.jsonl or .parquet in that directory."""
    trusted_modules: list[str] = field(default_factory=list)
    """Modules outside llmpipe whose classes a backend's _target_ may name."""

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            LLMConfigError: names the option and the bounds.
        """
        _count("seed", self.seed, 0, "an integer >= 0")
        _check(self.export_to is None or self.export is not None, "export_to", self.export_to, "given with export=")
        _check(not (self.plan and self.export), "plan", self.plan, "false with export=")
        if self.max_error_rate is not None:
            _number("max_error_rate", self.max_error_rate, 0, 1, "a number in (0, 1], or null", open_low=True)
        if self.run_timeout_s is not None:
            _number("run_timeout_s", self.run_timeout_s, 0, 1e9, "a number > 0, or null", open_low=True)


@dataclass
class ModelConfig(SamplingConfig):
    """A model and its defaults, flat: the friendly form for library users.

    Sampling options are those of `SamplingConfig`; options of the chosen backend (`threads`, `dtype`, …) go into
    `options`, and in a dictionary configuration beside the others.
    """

    model_path: str = BUNDLED
    """A local file or directory, a hub id, or `bundled`."""
    backend: BackendType | str = BackendType.LLAMA_CPP
    """A `BackendType`, its name, or a name given to `LLMRunnerFactory.register`."""
    device: DeviceType | str = DeviceType.AUTO
    """A `DeviceType` or its name, such as `cuda` or `cuda:1`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the backend, as in its config class."""

    def __post_init__(self) -> None:
        """Check sampling and device; the factory checks the backend and its options.

        Raises:
            LLMConfigError: names the option, the value and the bounds.
        """
        super().__post_init__()
        DeviceConfig.parse(self.device)
        self.model_path = str(self.model_path)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read `{"llm": {...}}` or the inner dictionary; what is no field of `ModelConfig` is a backend option.

        Raises:
            LLMConfigError: a value is out of range. Unknown backend options are refused by the factory.
        """
        flat = config.get("llm", config)
        _check(isinstance(flat, Mapping), "llm", flat, "a dictionary of options")
        own = {f.name for f in fields(cls)}
        options = {**flat.get("options", {}), **{k: v for k, v in flat.items() if k not in own}}
        return cls(**{**{k: v for k, v in flat.items() if k in own}, "options": options})

    @property
    def sampling(self) -> SamplingConfig:
        """The sampling options alone."""
        return SamplingConfig(**{f.name: getattr(self, f.name) for f in fields(SamplingConfig)})


# --- reading configurations ------------------------------------------------------------------------------------------


def reject_unknown(given: Iterable[str], allowed: Iterable[str], what: str, extra: Iterable[str] = ()) -> None:
    """Refuse the first name of `given` that is not in `allowed`, naming the nearest and all valid ones.

    Raises:
        LLMConfigError: a name is unknown.
    """
    allowed = list(allowed)
    for name in given:
        if name not in allowed:
            raise LLMConfigError(unknown_name(name, [*allowed, *extra], what))


def unknown_name(name: object, allowed: Iterable[str], what: str) -> str:
    """Say that `name` is unknown, which name is nearest, and which there are."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(str(name), allowed, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown {what} {name!r}{hint} There are: {', '.join(allowed)}"


def build(cls: type[Any], values: Mapping[str, Any], what: str) -> Any:
    """Make a config dataclass from plain values, converting enum names; unknown names are refused.

    Raises:
        LLMConfigError: a name is unknown or a value out of range.
    """
    known = {f.name: f for f in fields(cls)}
    reject_unknown(values, known, what, ())
    converted = dict(values)
    for name, f in known.items():
        default = f.default if f.default is not REQUIRED else None
        if isinstance(default, Enum) and name in values and not isinstance(values[name], Enum):
            kinds = [member.value for member in type(default)]
            value = {True: "on", False: "off"}.get(values[name], values[name])
            _check(value in kinds, f"{what} {name}", values[name], f"one of {', '.join(kinds)}")
            converted[name] = type(default)(value)
    return cls(**converted)


def describe(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain values that JSON can hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value

    return {name: plain(value) for name, value in asdict(config).items()}


def answer_fields(config: Any) -> dict[str, Any]:
    """Return the values that decide what a run answers, without those that only decide how fast."""
    values = describe(config)
    return {f.name: values[f.name] for f in fields(config) if not f.metadata.get("speed")}


def field_docs(cls: type) -> dict[str, str]:
    """Return the string under each field of a config dataclass, its bases' included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__ != __name__ or not hasattr(base, "__dataclass_fields__"):
            continue
        body = _class_bodies()[base.__name__]
        for statement, following in zip(body, body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                docs[statement.target.id] = ast.literal_eval(following.value)  # type: ignore[union-attr]
    return docs


@functools.cache
def _class_bodies() -> dict[str, list[ast.stmt]]:
    source = Path(inspect.getfile(RunConfig)).read_text(encoding="utf-8")
    return {node.name: node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


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
    package = Path(__file__).parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def data_dir() -> Path:
    """Return the directory of the example datasets, found as `conf_dir` finds its own."""
    return conf_dir().parent / "data"

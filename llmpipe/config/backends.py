"""The options of each backend: those of all, those of backends with continuous batching, and each one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmpipe.config.checks import check, count, number
from llmpipe.config.choices import BackendType, Batching, CacheType, Dtype, RopeScaling, Switch
from llmpipe.config.conversion import integer, settle
from llmpipe.config.options import option
from llmpipe.exceptions import LLMConfigError

BUNDLED = "bundled"
"""The value of `backend.model` that means the small model shipped with the package."""


@dataclass
class BackendConfig:
    """What every backend has; one of its own only adds to it."""

    _target_: str = option(
        "???", "Import path of the runner class; outside llmpipe it must be trusted, see trusted_modules."
    )
    model: str = option(BUNDLED, "A local file or directory, a hub id, or `bundled`.")
    slots: Any = option("auto", "Rows in flight at once: a number, or auto.", decides="nothing")
    threads: int | None = option(
        None,
        "CPU threads; by default the physical cores that this process may use (CPU affinity, cgroup quota).",
        decides="nothing",
    )
    context: int | None = option(
        None, "Most tokens of prompt and completion; by default what it was trained for (llama.cpp: and memory allows)."
    )
    reproducible: bool = option(False, "Give up speed so that a row's answer does not depend on the rows beside it.")
    chat_template: str | None = option(
        None, "A Jinja chat template, or a file that holds one, instead of the model's own."
    )
    isolation: bool = option(
        False,
        "Load the model in a process of its own, so that a row that crashes or hangs it becomes an error row.",
        decides="nothing",
    )
    row_timeout_s: float | None = option(
        None,
        "With isolation: seconds without any progress after which the backend hangs, and is started again.",
        decides="nothing",
    )

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            LLMConfigError: names the option, the value and the bounds.
        """
        settle(self, "backend.")
        check(bool(self.model.strip()), "backend.model", self.model, "a file, directory or hub id")
        if self.slots != "auto":
            self.slots = integer("backend.slots", self.slots)
            count("backend.slots", self.slots, 1, "an integer >= 1, or auto")
        if self.threads is not None:
            count("backend.threads", self.threads, 1, "an integer >= 1, or null")
        if self.context is not None:  # a token of the prompt, and one of the completion
            count("backend.context", self.context, 2, "an integer >= 2, or null")
        if self.row_timeout_s is not None:
            number("backend.row_timeout_s", self.row_timeout_s, 0, 1e9, "a number > 0, or null", open_low=True)
            if not self.isolation:
                raise LLMConfigError("backend.row_timeout_s needs backend.isolation=true")


@dataclass
class BatchingConfig(BackendConfig):
    """What the backends with continuous batching have."""

    batch_tokens: int = option(2048, "Most prompt tokens computed in one call.", decides="last_digits")

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            LLMConfigError: names the option, the value and the bounds.
        """
        super().__post_init__()
        count("backend.batch_tokens", self.batch_tokens, 1, "an integer >= 1")


@dataclass
class LlamaCppConfig(BatchingConfig):
    """GGUF models in process, through llama-cpp-python."""

    _target_: str = "llmpipe.runners.LlamaCppRunner"
    n_gpu_layers: int | None = option(
        None,
        "Layers whose weights go to the GPU, the rest stay on the CPU; -1 is all; by default all if device is a GPU.",
        decides="last_digits",
    )
    main_gpu: int = option(
        0,
        "llama.cpp's main_gpu, unused where it splits a model by layers, as here; device=cuda:1 chooses a GPU.",
        decides="last_digits",
    )
    tensor_split: list[float] = option(
        [], "Share of the model per GPU, such as [0.5, 0.5]; by default as memory allows.", decides="last_digits"
    )
    flash_attention: Switch = option(
        Switch.auto,
        "Fused attention, on or off. Its sums depend on the batch, so backend.reproducible has it off.",
    )
    cache_type_k: CacheType = option(CacheType.f16, f"Number format of cached keys: {', '.join(CacheType)}.")
    cache_type_v: CacheType = option(
        CacheType.f16, "Number format of cached values; quantised ones need flash attention."
    )
    micro_batch_tokens: int = option(
        512, "Tokens computed at once inside a call; larger takes more memory.", decides="last_digits"
    )
    mmap: bool = option(True, "Map the file into memory instead of reading it.", decides="nothing")
    mlock: bool = option(False, "Keep the model from being swapped out.", decides="nothing")
    repack: Switch = option(
        Switch.auto,
        "Lay quantised weights out for this processor, which is faster; auto: unless that crashes, as it may with AMX.",
        decides="last_digits",
    )
    lora: list[str] = option([], "LoRA adapters in GGUF, each FILE or FILE=SCALE.")
    rope_scaling: RopeScaling = option(
        RopeScaling.model, "model, none, linear or yarn: how contexts longer than trained for are reached."
    )
    rope_freq_base: float = option(0.0, "RoPE base frequency; 0 is the model's.")
    rope_freq_scale: float = option(0.0, "RoPE frequency scale, such as 0.5 for twice the context; 0 is the model's.")
    yarn_original_context: int = option(0, "Context the model was trained for, for yarn; 0 is the model's.")

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            LLMConfigError: names the option, the value and the bounds.
        """
        super().__post_init__()
        count("backend.micro_batch_tokens", self.micro_batch_tokens, 1, "an integer >= 1")
        number("backend.rope_freq_base", self.rope_freq_base, 0, 1e12, "a number >= 0 (0 is the model's)")
        number("backend.rope_freq_scale", self.rope_freq_scale, 0, 1e6, "a number >= 0 (0 is the model's)")
        count("backend.yarn_original_context", self.yarn_original_context, 0, "an integer >= 0 (0 is the model's)")
        _check_adapters(self.lora)
        if self.n_gpu_layers is not None:
            count("backend.n_gpu_layers", self.n_gpu_layers, -1, "an integer >= -1, or null")
        if self.reproducible and self.flash_attention is Switch.on:
            raise LLMConfigError("backend.reproducible=true needs backend.flash_attention=auto or off")


@dataclass
class TransformersConfig(BatchingConfig):
    """Any causal language model of transformers, on PyTorch."""

    _target_: str = "llmpipe.runners.TransformersRunner"
    dtype: Dtype = option(Dtype.auto, "Number format of weights and activations.")
    batching: Batching = option(
        Batching.auto, "auto, slots or padded: how rows share the model.", decides="last_digits"
    )
    attn_implementation: str | None = option(
        None, "eager, sdpa, flash_attention_2, …: transformers' own attention, in padded batches.", takes_trust=True
    )
    compile: bool = option(
        False, "torch.compile the forward pass; pays off on long runs on a GPU.", decides="last_digits"
    )
    device_map: str | None = option(
        None,
        "Spread the model over GPUs, host memory and disk through accelerate, such as auto; overrides device.",
        decides="last_digits",
    )
    max_memory: dict[Any, str] = option(
        {},
        "Most memory of the weights per device for device_map, such as {0: 20GiB, cpu: 60GiB}.",
        decides="last_digits",
    )
    offload_folder: str | None = option(
        None, "Where device_map puts the weights for which there is no memory.", decides="nothing"
    )
    lora: list[str] = option([], "LoRA adapters of peft, each DIRECTORY or DIRECTORY=SCALE; merged into the weights.")
    revision: str | None = option(None, "Branch, tag or commit of a hub model.")
    local_files_only: bool = option(False, "Never ask the hub; use what is in its cache.", decides="nothing")
    trust_remote_code: bool = option(
        False,
        "Run the Python code that a checkpoint brings. Off: such code can do anything. Not for a config group to set.",
        takes_trust=True,
    )
    allow_pickle: bool = option(
        False,
        "Load weights that are not safetensors. Off: unpickling can run code. Not for a config group to set.",
        takes_trust=True,
    )

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            LLMConfigError: names the option, the value and the bounds.
        """
        super().__post_init__()
        _check_adapters(self.lora)
        self.max_memory = {str(device): size for device, size in self.max_memory.items()}


@dataclass
class EchoConfig(BackendConfig):
    """No model: every row is answered with its own prompt, word by word. For trying a dataset and a config."""

    _target_: str = "llmpipe.runners.EchoRunner"
    model: str = option("none", "There is none.", decides="nothing")


BACKENDS: dict[BackendType, type[BackendConfig]] = {
    BackendType.LLAMA_CPP: LlamaCppConfig,
    BackendType.TRANSFORMERS: TransformersConfig,
    BackendType.ECHO: EchoConfig,
}


def split_adapter(text: str) -> tuple[str, float]:
    """Return path and scale of a LoRA adapter written as PATH or PATH=SCALE."""
    name, sign, scale = text.rpartition("=")
    try:
        return (name, float(scale)) if sign else (text, 1.0)
    except ValueError:  # an equals sign in the file's name
        return text, 1.0


def _check_adapters(adapters: Sequence[str]) -> None:
    for adapter in adapters:
        check(bool(split_adapter(adapter)[0]), "backend.lora", adapter, "PATH or PATH=SCALE")
        number(f"the scale in backend.lora={adapter!r}", split_adapter(adapter)[1], -1e6, 1e6, "a finite number")

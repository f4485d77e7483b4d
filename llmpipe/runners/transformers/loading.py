"""A checkpoint → a model on its device, its tokenizer, and what they say of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.utils import logging as transformers_logging

from llmpipe.config import DeviceConfig, Dtype, TransformersConfig, split_adapter
from llmpipe.exceptions import LLMInitializationError, MissingDependencyError
from llmpipe.runners.chat import read_template

transformers_logging.disable_progress_bar()  # llmpipe shows its own

DEFAULT_CONTEXT = 4096
"""For models that do not say what they were trained for."""
STATEFUL = ("recurrent_gemma",)
"""Models that transformers' caches know nothing of."""


@dataclass
class Loaded:
    """A model that is ready to generate."""

    model: Any
    tokenizer: Any
    end_tokens: set[int]
    """Ids that end a generation."""
    context: int
    """Most tokens of prompt and completion that it is good for."""
    choices: list[str] = field(default_factory=list)
    """What was chosen automatically, and why."""


def load(config: TransformersConfig, path: str, device: torch.device) -> Loaded:
    """Load a checkpoint.

    Args:
        config: How to load it.
        path: A directory, a GGUF file, or a hub id.
        device: Where it goes, unless `config.device_map` says otherwise.

    Raises:
        LLMInitializationError: it is no causal language model, or needs a package that is not installed.
    """
    source: dict[str, Any] = {"local_files_only": config.local_files_only}
    if path.endswith(".gguf"):
        source["gguf_file"] = Path(path).name
        path = str(Path(path).parent)
    else:
        source |= {"revision": config.revision or "main", "trust_remote_code": config.trust_remote_code}
    try:
        model_config = AutoConfig.from_pretrained(path, **source)
        _refuse_what_does_not_generate(config.model, model_config)
        tokenizer = AutoTokenizer.from_pretrained(path, **source)
        dtype, choices = choose_dtype(config, model_config, device)
        model, details = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=None if config.allow_pickle or "gguf_file" in source else True,
            attn_implementation=config.attn_implementation,
            device_map=config.device_map,
            max_memory={_device_key(name): size for name, size in config.max_memory.items()} or None,
            offload_folder=config.offload_folder,
            output_loading_info=True,
            **source,
        )
    except ImportError as error:
        text = " ".join(str(error).split())
        raise LLMInitializationError(f"{config.model} needs a package that is not installed: {text}") from error
    _refuse_what_would_be_random(config.model, model, details["missing_keys"])
    if config.chat_template:
        tokenizer.chat_template = read_template(config.chat_template)
    if config.device_map is None and getattr(model, "hf_quantizer", None) is None:
        model = model.to(device)
    for adapter in config.lora:
        model = _with_adapter(model, adapter)
    if config.compile:
        model.forward = torch.compile(model.forward, dynamic=True)
    return Loaded(model.eval(), tokenizer, _end_tokens(model, tokenizer), _context(model_config), choices)


def _refuse_what_does_not_generate(name: str, model_config: Any) -> None:
    """Refuse what its config says is no causal language model.

    Raises:
        LLMInitializationError: names the model's class.
    """
    kind, model_type = type(model_config).__name__, model_config.model_type
    if getattr(model_config, "is_encoder_decoder", False):
        raise LLMInitializationError(
            f"{name} is an encoder-decoder model ({kind}); llmpipe runs causal language models"
        )
    if "AutoModelForCausalLM" in (getattr(model_config, "auto_map", None) or {}):
        return  # the checkpoint brings a class of its own
    classes = getattr(model_config, "architectures", None) or []
    generates = not classes or any(cls in CAUSAL.values() or cls.endswith("Model") for cls in classes)
    if model_type not in CAUSAL or not generates:
        shown = ", ".join(classes) or kind
        raise LLMInitializationError(f"{name} ({shown}) generates no text; llmpipe runs causal language models")
    if model_type in STATEFUL:
        raise LLMInitializationError(f"{name} ({kind}) keeps rows' states in its modules, so rows would mix")


def _refuse_what_would_be_random(name: str, model: Any, missing: Sequence[str]) -> None:
    """Refuse a checkpoint without the head that generates, and one whose tokens see those after them.

    Raises:
        LLMInitializationError: names the model's class and what is missing.
    """
    kind = type(model).__name__
    stored = ", ".join(getattr(model.config, "architectures", None) or [type(model.config).__name__])
    if missing:
        shown = ", ".join(sorted(missing)[:3])
        raise LLMInitializationError(
            f"{name} ({stored}) is an encoder or embedding model, or incomplete: as {kind} it lacks {shown}"
        )
    if any(getattr(module, "is_decoder", None) is False for module in model.modules()):
        raise LLMInitializationError(f"{name} is an encoder model ({kind} with is_decoder=false): it generates no text")


def choose_dtype(
    config: TransformersConfig, model_config: Any, device: torch.device
) -> tuple[torch.dtype | str, list[str]]:
    """Return the number format to compute in, and why, where it is not simply what was asked for.

    A CPU without bfloat16 units emulates it, several times slower than float32; none computes float16 well.
    """
    if config.dtype is not Dtype.auto:
        dtype: torch.dtype = getattr(torch, config.dtype.value)
        return dtype, []
    stored = getattr(model_config, "dtype", None)
    if getattr(model_config, "quantization_config", None) is not None or stored in (None, torch.float32):
        return "auto", []
    if device.type == "cpu":
        if stored is torch.bfloat16 and has_bfloat16_units():
            return "auto", ["bfloat16: the checkpoint's, and this processor has units for it"]
        return torch.float32, [f"float32: this processor computes {str(stored).removeprefix('torch.')} slowly"]
    if device.type == "cuda" and stored is torch.bfloat16 and not torch.cuda.is_bf16_supported(False):
        return torch.float16, ["float16: this GPU has no units for bfloat16"]
    return "auto", []


def has_bfloat16_units() -> bool:
    """Say whether the processor multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _device_key(name: str) -> int | str:
    """Return a device as accelerate names it in `max_memory`: GPUs by number."""
    return int(name) if name.isdecimal() else name


def _with_adapter(model: Any, text: str) -> Any:
    """Merge a LoRA adapter into a model's weights."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingDependencyError("peft", "lora", "backend.lora with backend=transformers") from error
    name, scale = split_adapter(text)
    if not (Path(name) / "adapter_config.json").is_file():
        raise LLMInitializationError(f"backend.lora: {name!r} is no directory with an adapter_config.json")
    adapted = PeftModel.from_pretrained(model, name)
    for module in adapted.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {key: value * scale for key, value in module.scaling.items()}
    return adapted.merge_and_unload()


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the ids that end a generation: those of the generation config, and the tokenizer's one.

    Fine-tuned chat models often name their end of turn in only one of the two.
    """
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
    return {end for end in (*ends, tokenizer.eos_token_id) if end is not None}


def _context(model_config: Any) -> int:
    """Return the most tokens a row can have so that its positions do not depend on the rows beside it.

    Models with LongRoPE rotate all positions by other factors once any is beyond the original context.
    """
    text_config = model_config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    rope = getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return int(rope.get("original_max_position_embeddings") or limit)
    return int(limit)


def torch_device(device: DeviceConfig) -> torch.device:
    """Return the torch device that `device` means on this machine; `auto` is cuda, mps or cpu, the first there is.

    Raises:
        LLMInitializationError: the device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(name for name, found in there.items() if found) if device.type == "auto" else device.type
    if not there[kind]:
        found = ", ".join(name for name, is_there in there.items() if is_there)
        raise LLMInitializationError(
            f"device={device}, but PyTorch {torch.__version__} finds no {kind} device here; use one of auto, {found}"
        )
    if kind == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise LLMInitializationError(
            f"device={device}, but there are {torch.cuda.device_count()} CUDA devices, from cuda:0"
        )
    return torch.device(kind, device.index) if device.index is not None else torch.device(kind)

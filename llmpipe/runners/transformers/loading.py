"""A checkpoint → a model on its device, its tokenizer, and what they say of themselves."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any, Self

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, modeling_gguf_pytorch_utils
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.utils import logging as transformers_logging

from llmpipe.config import DeviceConfig, Dtype, TransformersConfig, split_adapter
from llmpipe.exceptions import LLMInitializationError, MissingDependencyError, one_line
from llmpipe.runners import hub
from llmpipe.runners.batching import Footprint
from llmpipe.runners.chat import read_template
from llmpipe.runners.transformers.executor import GPU_SLOTS
from llmpipe.runners.transformers.files import refuse_adapter, refuse_strangers
from llmpipe.runners.transformers.trial import try_tokenizer
from llmpipe.runners.weights import cached, local_path

log = logging.getLogger(__name__)
if not log.isEnabledFor(logging.DEBUG):
    transformers_logging.disable_progress_bar()  # llmpipe shows its own
modeling_gguf_pytorch_utils.tqdm = transformers_logging.tqdm  # that heeds the line above

DEFAULT_CONTEXT = 4096
"""For models that do not say what they were trained for."""
MOST_LAYERS = 2000
"""A config with more is damaged."""
STATEFUL = ("recurrent_gemma",)
"""Models that transformers' caches know nothing of."""
GGUF_ENDS = {
    *("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<end_of_turn>"),
    *("<|end|>", "<|return|>", "<|call|>", "<EOT>", "_<EOT>"),
}
"""Tokens that end a generation by their text, as for llama.cpp: a GGUF file names only one or two of a model's."""


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
    with Checkpoint(config, path) as checkpoint, _packages_named(config.model):
        model_config, tokenizer = checkpoint.config, checkpoint.tokenizer
        dtype, choices = choose_dtype(config, model_config, device)
        model, details = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            config=model_config,
            dtype=dtype,
            use_safetensors=None if config.allow_pickle or "gguf_file" in checkpoint.source else True,
            attn_implementation=config.attn_implementation,
            # A map puts quantised weights on the device as well, which cannot all be moved there afterwards.
            device_map=config.device_map or (None if device.type == "cpu" else {"": device}),
            max_memory={_device_key(name): size for name, size in config.max_memory.items()} or None,
            offload_folder=config.offload_folder,
            output_loading_info=True,
            **checkpoint.source,
        )
    _refuse_what_would_be_random(config.model, model, details["missing_keys"])
    for adapter in config.lora:
        model = _with_adapter(model, adapter, config.allow_pickle)
    ends = _end_tokens(model, tokenizer)
    if "gguf_file" in checkpoint.source:
        ends |= {id for text, id in tokenizer.get_vocab().items() if text in GGUF_ENDS}
    return Loaded(model.eval(), tokenizer, ends, checkpoint.context, choices)


class Checkpoint:
    """What a checkpoint says of itself: its config and its tokenizer, without the weights.

    A GGUF file is loaded from a directory of its own, because transformers would also read files that lie beside it.

    Args:
        config: How to load it.
        path: A directory, a GGUF file, or a hub id.

    Raises:
        LLMInitializationError: it is no causal language model, or needs a package that is not installed.
    """

    def __init__(self, config: TransformersConfig, path: str) -> None:
        self._asked = config
        self.path = path = _at_hand(config, path)
        self.source: dict[str, Any] = {"local_files_only": config.local_files_only}
        with ExitStack() as stack, _packages_named(config.model):
            if path.endswith(".gguf"):
                self.path = stack.enter_context(TemporaryDirectory())
                self.source["gguf_file"] = name = Path(path).name
                (Path(self.path) / name).symlink_to(Path(path).resolve())
            else:
                self.source |= {"revision": config.revision or "main", "trust_remote_code": config.trust_remote_code}
            self.config = AutoConfig.from_pretrained(self.path, **self.source)
            _refuse_what_does_not_generate(config.model, self.config)
            if "gguf_file" not in self.source:
                refuse_adapter(config.model, path, self.source)
                refuse_strangers(config.model, path, self.source, config.allow_pickle)
            if not config.trust_remote_code:
                refuse_kernels(config, self.config)
            _settle_rope(self.config.get_text_config(), config.context)
            try_tokenizer(config.model, self.path, self.source)
            self.tokenizer = AutoTokenizer.from_pretrained(self.path, **self.source)
            if config.chat_template:
                self.tokenizer.chat_template = read_template(config.chat_template)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def context(self) -> int:
        """Most tokens of prompt and completion that the model is good for."""
        return _context(self.config)

    def outline(self, device: torch.device) -> tuple[Any, Footprint]:
        """Return the model without its weights, and what it will take of `device` with them."""
        with torch.device("meta"), _packages_named(self._asked.model):
            model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=self._asked.trust_remote_code)
        dtype = choose_dtype(self._asked, self.config, device)[0]
        size = (dtype if isinstance(dtype, torch.dtype) else self.config.dtype or torch.float32).itemsize
        parameters = sum(p.numel() for p in model.parameters())
        files = Path(self.path).glob("*.safetensors") if getattr(self.config, "quantization_config", None) else ()
        return model, Footprint(
            parameters=parameters,
            cache_bytes_per_token=_cache_values_per_token(model) * size,
            gpu_slots=None if device.type == "cpu" else GPU_SLOTS,
            # Of quantised weights only the files tell the size.
            mapped_bytes=sum(file.stat().st_size for file in files) or parameters * size,
        )


def _at_hand(config: TransformersConfig, path: str) -> str:
    """Return where the cache has a hub model if the hub does not answer, else the path as it is.

    Raises:
        LLMInitializationError: neither has it.
    """
    if config.local_files_only or local_path(config.model) is not None:
        return path
    here = cached(config.model, "config.json", config.revision)
    return path if hub.is_needed(path, here is not None) else str(here.parent)  # type: ignore[union-attr]


@torch.inference_mode()  # type: ignore[untyped-decorator]
def _cache_values_per_token(model: Any) -> int:
    """Return how many numbers a model without weights puts into its cache for a token; 0 where that cannot be told."""
    cache = DynamicCache(config=model.config)
    token = torch.zeros(1, 1, dtype=torch.long, device="meta")
    try:
        model(input_ids=token, past_key_values=cache, use_cache=True)
    except Exception as error:  # a model is a program of someone else's: without numbers it may fail in any way
        log.debug("%s cannot be sized without its weights: %s", type(model).__name__, error)
        return 0
    kept = [(layer.keys, layer.values) for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum(keys.numel() + values.numel() for keys, values in kept)


@contextmanager
def _packages_named(model: str) -> Iterator[None]:
    """Turn the want of a package into an error that names it."""
    try:
        yield
    except ImportError as error:
        text = one_line(error)
        raise LLMInitializationError(f"{model} needs a package that is not installed: {text}") from error


def _refuse_what_does_not_generate(name: str, model_config: Any) -> None:
    """Refuse what its config says is no causal language model.

    Raises:
        LLMInitializationError: names the model's class.
    """
    kind, model_type = type(model_config).__name__, model_config.model_type
    layers = getattr(model_config.get_text_config(), "num_hidden_layers", None) or 0
    if not isinstance(layers, int) or layers > MOST_LAYERS:  # they would be made one by one, for ever
        raise LLMInitializationError(f"{name}: num_hidden_layers={layers!r} in config.json is no model's")
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


def refuse_kernels(config: TransformersConfig, model_config: Any) -> None:
    """Refuse a checkpoint that chooses an attention from the hub, which is code, unless the user chooses another.

    Raises:
        LLMInitializationError: names it.
    """
    for part in (*_parts(model_config), model_config.get_text_config()):
        if "/" not in str(part._attn_implementation):
            continue
        if config.attn_implementation is None:
            raise LLMInitializationError(
                f"{config.model} chooses an attention from the hub ({part._attn_implementation}), which is code: use "
                f"backend.attn_implementation=sdpa, or backend.trust_remote_code=true if you trust it"
            )
        part._attn_implementation = config.attn_implementation


def _parts(model_config: Any) -> Iterator[Any]:
    """Yield a config and those inside of it, as of a model that also sees."""
    yield model_config
    for name in model_config.sub_configs:
        if (inner := getattr(model_config, name, None)) is not None:
            yield from _parts(inner)


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


def _with_adapter(model: Any, text: str, allow_pickle: bool) -> Any:
    """Merge a LoRA adapter into a model's weights.

    Raises:
        LLMInitializationError: there is none, it is pickled, or it is not for this model.
        MissingDependencyError: peft is not installed.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingDependencyError("peft", "lora", "backend.lora with backend=transformers") from error
    name, scale = split_adapter(text)
    if not (Path(name) / "adapter_config.json").is_file():
        raise LLMInitializationError(f"backend.lora: {name!r} is no directory with an adapter_config.json")
    if not (allow_pickle or (Path(name) / "adapter_model.safetensors").is_file()):
        raise LLMInitializationError(
            f"backend.lora: {name!r} has no adapter_model.safetensors; pickled weights need backend.allow_pickle=true"
        )
    refuse_strangers(f"backend.lora: {name}", name, {"local_files_only": True}, allow_pickle)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")  # those would be left without effect
            adapted = PeftModel.from_pretrained(model, name)
        for module in adapted.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling = {key: value * scale for key, value in module.scaling.items()}
        return adapted.merge_and_unload()
    except Exception as error:  # peft has an error of another type for each thing that does not fit
        text = shorten(str(error), 300, placeholder=" …")
        raise LLMInitializationError(f"backend.lora: {name!r} cannot be merged into the model: {text}") from error


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the ids that end a generation: those of the generation config, and the tokenizer's one.

    Fine-tuned chat models often name their end of turn in only one of the two.
    """
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
    return {end for end in (*ends, tokenizer.eos_token_id) if end is not None}


def _context(model_config: Any) -> int:
    """Return the most tokens a row can have; with LongRoPE, those before other factors apply, unless set by hand."""
    text_config = model_config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    rope = getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return int(rope.get("original_max_position_embeddings") or limit)
    return int(limit)


def _settle_rope(text_config: Any, context: int | None) -> None:
    """See to it that a row's positions do not depend on how long it is, or the rows beside it are.

    Models with LongRoPE rotate all positions by other factors once any is beyond the original context: where a longer
    one is asked for, those factors apply from the start.

    Raises:
        LLMInitializationError: the factors are computed anew for every length beyond the original context.
    """
    rope = getattr(text_config, "rope_parameters", None) or {}
    limit = rope.get("original_max_position_embeddings") or getattr(text_config, "max_position_embeddings", None)
    if context is None or limit is None or context <= limit:
        return
    if rope.get("rope_type") == "longrope":
        rope["short_factor"] = rope["long_factor"]
    elif rope.get("rope_type") == "dynamic":
        raise LLMInitializationError(
            f"backend.context={context}, but with dynamic RoPE a row of more than {limit} tokens changes the others"
        )


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

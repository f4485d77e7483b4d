"""`TransformersRunner`: causal language models of transformers, on PyTorch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from llmpipe.config import DeviceConfig, Dtype, TransformersConfig
from llmpipe.exceptions import LLMInitializationError, MissingDependencyError
from llmpipe.records import Chunk, Message, Request
from llmpipe.runners.base import BaseLLMRunner, check_bias, fit_prompt
from llmpipe.runners.chat import ChatTemplateError, read_template
from llmpipe.runners.weights import find_checkpoint

try:
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from llmpipe.runners.transformers.padded import PaddedEngine
except ImportError as error:
    raise MissingDependencyError("transformers and torch", "transformers", "backend=transformers") from error

log = logging.getLogger(__name__)
transformers.utils.logging.disable_progress_bar()  # llmpipe shows its own

DEFAULT_SLOTS = 16
DEFAULT_CONTEXT = 4096
"""For models that do not say what they were trained for."""


class TransformersRunner(BaseLLMRunner):
    """Runs a causal language model in padded batches."""

    config_type = TransformersConfig
    config: TransformersConfig
    _model: Any = None
    _tokenizer: Any = None
    _engine: PaddedEngine | None = None

    def _initialize_model(self) -> None:
        config = self.config
        path = find_checkpoint(config.model)
        self._torch_device = torch_device(self.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        hub = {
            "revision": config.revision or "main",
            "local_files_only": config.local_files_only,
            "trust_remote_code": config.trust_remote_code,
        }
        model_config = AutoConfig.from_pretrained(path, **hub)
        if getattr(model_config, "is_encoder_decoder", False):
            kind = type(model_config).__name__
            raise LLMInitializationError(
                f"{config.model} is an encoder-decoder model ({kind}); llmpipe runs causal language models"
            )
        self._tokenizer = AutoTokenizer.from_pretrained(path, **hub)
        if config.chat_template:
            self._tokenizer.chat_template = read_template(config.chat_template)
        self._dtype = self._choose_dtype()
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=self._dtype,
            use_safetensors=None if config.allow_pickle else True,
            attn_implementation=config.attn_implementation,
            device_map=config.device_map,
            **hub,
        )
        if config.device_map is None:
            model = model.to(self._torch_device)
        self._model = model.eval()
        if config.compile:
            self._model.forward = torch.compile(self._model.forward, dynamic=True)
        limit = getattr(model_config.get_text_config(), "max_position_embeddings", None) or DEFAULT_CONTEXT
        self._context = config.context or limit
        self._slots = DEFAULT_SLOTS if config.slots == "auto" else int(config.slots)
        if config.reproducible:
            # The kernels that multiply matrices are chosen by their shapes: only a row alone is sure to be the same.
            self._slots = 1
        self._engine = PaddedEngine(self._model, self._tokenizer, self._end_tokens(), self._slots, self._context)
        log.info(
            "%s: %s in %s on %s, batches of %d rows of at most %d tokens",
            config.model, type(model).__name__, model.dtype, model.device, self._slots, self._context,
        )  # fmt: skip

    def _choose_dtype(self) -> torch.dtype | str:
        if self.config.dtype is not Dtype.auto:
            dtype: torch.dtype = getattr(torch, self.config.dtype.value)
            return dtype
        if self._torch_device.type == "cpu" and self.config.device_map is None:
            return torch.float32
        return "auto"

    def _end_tokens(self) -> set[int]:
        """Return the ids that end a generation: those of the generation config, and the tokenizer's one.

        Fine-tuned chat models often name their end of turn in only one of the two.
        """
        ends = self._model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        return {end for end in (*ends, self._tokenizer.eos_token_id) if end is not None}

    def _release_model(self) -> None:
        self._engine = self._model = self._tokenizer = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def stream(self, requests: Iterable[Request]) -> Iterator[Chunk]:
        """Answer `requests` in batches of `backend.slots` rows; see `BaseLLMRunner.stream`."""
        self._check_loaded()
        assert self._engine is not None
        return self._engine.stream(requests, self.encode)

    def encode(self, request: Request) -> tuple[list[int], int]:
        """Return a request's prompt tokens, and how many were cut off on the left to fit the context.

        Raises:
            ValueError: the prompt is empty, exceeds the context, is no text, or the template refuses it.
        """
        check_bias(request.sampling, self._model.config.get_text_config().vocab_size)
        text = self.prompt_text(request)
        text.encode("utf-8")  # a lone surrogate is an error here, and not a panic in the tokenizer
        ids = self._tokenizer(text, add_special_tokens=request.messages is None, verbose=False)["input_ids"]
        return fit_prompt(list(ids), self._context, request.truncate)

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's template, or the configured one."""
        template = self._tokenizer.chat_template if self._tokenizer is not None else None
        if isinstance(template, dict):
            template = template.get("default")
        return template if template is None else str(template)

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt text of a chat; see `BaseLLMRunner.render`."""
        if self.chat_template is None:
            raise ChatTemplateError("the model has no chat template: use prompt=raw or backend.chat_template=FILE")
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of the model's: it may fail in any way
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from error
        return str(text)

    def info(self) -> dict[str, Any]:
        """Say what was loaded and what was chosen."""
        self._check_loaded()
        return {
            "model": self.config.model,
            "model_type": type(self._model).__name__,
            "device": str(self._model.device),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "slots": self._slots,
            "context": self._context,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def _device_memory_mb(self) -> tuple[float, float] | None:
        if self._torch_device.type != "cuda":
            return None
        now, peak = (
            torch.cuda.memory_allocated(self._torch_device),
            torch.cuda.max_memory_allocated(self._torch_device),
        )
        return now / 1e6, peak / 1e6


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

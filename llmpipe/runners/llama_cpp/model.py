"""A GGUF file in memory: loading, tokens, text, chat template. Knows nothing of requests."""

from __future__ import annotations

import ctypes
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import llama_cpp

from llmpipe.config import DeviceConfig, LlamaCppConfig, split_adapter
from llmpipe.config.checks import readable
from llmpipe.exceptions import LLMInitializationError
from llmpipe.runners.chat import ChatTemplate, read_template
from llmpipe.runners.control_tokens import ControlTexts
from llmpipe.runners.encoding import Around
from llmpipe.runners.llama_cpp import log
from llmpipe.runners.llama_cpp.deep_stack import reading

CONTROL = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
LOAD_MODES = {  # (mmap, mlock) → how the file gets into memory
    (False, False): llama_cpp.LLAMA_LOAD_MODE_NONE,
    (True, False): llama_cpp.LLAMA_LOAD_MODE_MMAP,
    (False, True): llama_cpp.LLAMA_LOAD_MODE_MLOCK,
    (True, True): llama_cpp.LLAMA_LOAD_MODE_MMAP_MLOCK,
}


class Model:
    """The weights and the vocabulary.

    Args:
        path: The file.
        config: How it is loaded.
        offload: Whether layers go to a GPU.
        gpu: To which one alone; None leaves that to llama.cpp.
        repack: Whether quantised weights may be laid out anew for this processor.

    Raises:
        LLMInitializationError: the file is no model that can generate text, or does not fit in memory.
    """

    vocab_only = False

    def __init__(
        self, path: Path, config: LlamaCppConfig, offload: bool, gpu: int | None = None, repack: bool = True
    ) -> None:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = self.vocab_only
        params.n_gpu_layers = (-1 if config.n_gpu_layers is None else config.n_gpu_layers) if offload else 0
        params.main_gpu = config.main_gpu
        params.use_extra_bufts = repack
        if offload and gpu is not None:  # device=cuda:1 means there and nowhere else
            params.split_mode, params.main_gpu = llama_cpp.LLAMA_SPLIT_MODE_NONE, gpu
        params.load_mode = LOAD_MODES[config.mmap, config.mlock]
        if config.tensor_split:
            # Kept on self: llama.cpp reads the array after the parameters were filled.
            self._tensor_split = (ctypes.c_float * llama_cpp.llama_max_devices())(*config.tensor_split)
            params.tensor_split = self._tensor_split
        template = read_template(config.chat_template) if config.chat_template else None
        self._adapters: list[tuple[Any, float]] = []
        self.handle = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            raise LLMInitializationError(f"llama.cpp cannot load {path}: {log.last_errors() or 'no reason given'}")
        try:
            self._read(path, template)
            for adapter in config.lora:
                self._load_adapter(adapter)
        except BaseException:
            self.close()
            raise

    def _read(self, path: Path, template: str | None) -> None:
        self.vocab = llama_cpp.llama_model_get_vocab(self.handle)
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self._pieces: dict[int, bytes] = {}
        self._ends: dict[int, bool] = {}
        if not self.n_vocab:
            raise LLMInitializationError(f"{path} has no vocabulary, so it cannot read text")
        if obstacle := self._obstacle():
            raise LLMInitializationError(f"{path} ({self.describe()}) {obstacle}; llmpipe runs decoder-only models")
        source = template or self._metadata_template()
        self.chat = ChatTemplate(source, self._special_tokens()) if source else None
        source = None if template else self._metadata_template(b"tool_use")
        self.tool_chat = ChatTemplate(source, self._special_tokens()) if source else self.chat

    def _obstacle(self) -> str | None:
        """Say why the model cannot write on from a text; None where it can."""
        if llama_cpp.llama_model_has_encoder(self.handle) or not llama_cpp.llama_model_has_decoder(self.handle):
            return "has an encoder"
        if llama_cpp.llama_model_is_diffusion(self.handle):
            return "writes by diffusion"
        arch = self.metadata("general.architecture")
        # EmbeddingGemma's files do not say so.
        if arch == "gemma-embedding" or self.metadata(f"{arch}.attention.causal") == "false":
            return "reads in both directions, to embed text"
        return None

    def describe(self) -> str:
        """Return architecture, size and number format, such as `llama 134.5M Q4_1`; the size is that of the tensors.

        llama.cpp's own short description names a size that it guesses from the number of layers.
        """
        buffer = ctypes.create_string_buffer(256)
        llama_cpp.llama_model_desc(self.handle, buffer, len(buffer))
        text = buffer.value.decode("utf-8", "replace")
        return re.sub(r"^(\S+) \S+( \([A-Z]\w+\))?", rf"\1 {self.parameters / 1e6:.1f}M", text)

    @property
    def train_context(self) -> int:
        """Most tokens of a text that the model was trained for."""
        return int(llama_cpp.llama_model_n_ctx_train(self.handle))

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return int(llama_cpp.llama_model_size(self.handle))

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return int(llama_cpp.llama_model_n_params(self.handle))

    @property
    def cache_values_per_token(self) -> tuple[int, int]:
        """Numbers that the cache holds per token, as keys and as values; (0, 0) where its size does not grow."""
        if self._has_states:
            numbers = self._measured_cache[0] // 4
            return numbers // 2, numbers - numbers // 2
        heads = llama_cpp.llama_model_n_head_kv(self.handle) * llama_cpp.llama_model_n_layer(self.handle)
        size = llama_cpp.llama_model_n_embd(self.handle) // max(llama_cpp.llama_model_n_head(self.handle), 1)
        arch = self.metadata("general.architecture")
        key = self.metadata(f"{arch}.attention.key_length") or size
        value = self.metadata(f"{arch}.attention.value_length") or size
        return heads * int(key), heads * int(value)

    @property
    def state_bytes(self) -> int:
        """Bytes that recurrent layers keep per sequence, however long it is."""
        return self._measured_cache[1] if self._has_states else 0

    @property
    def _has_states(self) -> bool:
        return bool(llama_cpp.llama_model_is_recurrent(self.handle) or llama_cpp.llama_model_is_hybrid(self.handle))

    @cached_property
    def _measured_cache(self) -> tuple[int, int]:
        """Bytes of F32 cache per token and per sequence: measured, as layers differ and the API tells the first one."""
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 2
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type, params.offload_kqv, params.no_perf = 0, False, True
        log.clear()
        context = llama_cpp.llama_init_from_model(self.handle, params)
        token = (llama_cpp.llama_token * 1)(0)
        try:
            sizes = []
            for _ in range(2):
                if not context or llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(token, 1)):
                    raise LLMInitializationError(f"llama.cpp cannot compute: {log.last_errors() or 'no reason given'}")
                sizes.append(llama_cpp.llama_state_seq_get_size(context, 0))
        finally:
            if context:
                llama_cpp.llama_free(context)
        return sizes[1] - sizes[0], 2 * sizes[0] - sizes[1]

    def metadata(self, key: str) -> str | None:
        """Return a value of the file's metadata as text, or None."""
        buffer = ctypes.create_string_buffer(1024)
        found = llama_cpp.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if found >= 0 else None

    def tokenize(self, text: str, literal: bool = False, inside: bool = False) -> list[int]:
        """Return the token ids of `text`; see `Tokenizer.tokenize`. What stands before a text never matters here.

        Raises:
            UnicodeEncodeError: `text` has a lone surrogate.
            ValueError: there is no stack that `text` could be read on.
        """
        return self._tokenize(text, add_special=False, parse_special=not literal)

    def _tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode("utf-8")

        def read() -> list[int]:
            room = len(data) + 8
            while True:
                ids = (llama_cpp.llama_token * room)()
                count = llama_cpp.llama_tokenize(self.vocab, data, len(data), ids, room, add_special, parse_special)
                if count >= 0:
                    return list(ids[:count])
                room = -count

        return reading(text, read)

    @cached_property
    def control(self) -> ControlTexts:
        """The tokens that llama.cpp reads as such only where it is told to; see `Tokenizer.control`."""
        kinds = {token: llama_cpp.llama_vocab_get_attr(self.vocab, token) for token in range(self.n_vocab)}
        texts = {
            token: llama_cpp.llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace")
            for token, kind in kinds.items()
            if kind & CONTROL
        }
        return ControlTexts(
            {text: token for token, text in texts.items()},
            left=[text for token, text in texts.items() if kinds[token] & llama_cpp.LLAMA_TOKEN_ATTR_LSTRIP],
            right=[text for token, text in texts.items() if kinds[token] & llama_cpp.LLAMA_TOKEN_ATTR_RSTRIP],
        )

    @cached_property
    def around(self) -> Around:
        """What the file asks for around raw text; see `Tokenizer.around`."""
        bos = llama_cpp.llama_vocab_bos(self.vocab)
        plain, whole = (self._tokenize("a", add_special=special, parse_special=True) for special in (False, True))
        return Around.between(bos if bos >= 0 else None, plain, whole)

    def piece(self, token: int) -> bytes:
        """Return the bytes a token stands for; nothing for control tokens."""
        if token not in self._pieces:
            buffer = ctypes.create_string_buffer(64)
            count = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, False)
            if count < 0:
                buffer = ctypes.create_string_buffer(-count)
                count = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, False)
            self._pieces[token] = buffer.raw[:count]
        return self._pieces[token]

    def is_end(self, token: int) -> bool:
        """Say whether `token` ends a generation: EOS, end of turn, and the like."""
        if token not in self._ends:
            self._ends[token] = bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))
        return self._ends[token]

    def apply_adapters(self, context: Any) -> None:
        """Make a context compute with the LoRA adapters.

        Raises:
            LLMInitializationError: llama.cpp refuses them.
        """
        count = len(self._adapters)
        if not count:
            return
        handles = (llama_cpp.llama_adapter_lora_p_ctypes * count)(*(handle for handle, _ in self._adapters))
        scales = (ctypes.c_float * count)(*(scale for _, scale in self._adapters))
        if llama_cpp.llama_set_adapters_lora(context, handles, count, scales):
            raise LLMInitializationError(f"llama.cpp refuses the LoRA adapters: {log.last_errors()}")

    def _load_adapter(self, text: str) -> None:
        path, scale = adapter_file(text)
        handle = llama_cpp.llama_adapter_lora_init(self.handle, os.fsencode(path))
        if not handle:
            reason = log.last_errors() or "no reason given"
            raise LLMInitializationError(f"llama.cpp cannot load the adapter {path}: {reason}")
        self._adapters.append((handle, scale))
        if llama_cpp.llama_adapter_get_alora_n_invocation_tokens(handle):
            raise LLMInitializationError(
                f"backend.lora: {path} is an activated LoRA, switched on by tokens of the prompt; llmpipe applies an "
                "adapter to all tokens"
            )

    def close(self) -> None:
        """Free the weights and the adapters."""
        for handle, _ in self._adapters:
            llama_cpp.llama_adapter_lora_free(handle)
        self._adapters.clear()
        if self.handle:
            llama_cpp.llama_model_free(self.handle)
            self.handle = None

    def _metadata_template(self, name: bytes | None = None) -> str | None:
        template = llama_cpp.llama_model_chat_template(self.handle, name)
        return template.decode("utf-8", "replace") if template else None

    def _special_tokens(self) -> dict[str, str]:
        ids = {
            "bos_token": llama_cpp.llama_vocab_bos(self.vocab),
            "eos_token": llama_cpp.llama_vocab_eos(self.vocab),
            "pad_token": llama_cpp.llama_vocab_pad(self.vocab),
        }
        texts = {name: llama_cpp.llama_vocab_get_text(self.vocab, i) for name, i in ids.items() if i >= 0}
        return {name: text.decode("utf-8", "replace") for name, text in texts.items()}


def adapter_file(text: str) -> tuple[Path, float]:
    """Return file and scale of a LoRA adapter.

    Raises:
        LLMInitializationError: there is no such file.
    """
    name, scale = split_adapter(text)
    with readable("backend.lora", name, LLMInitializationError):
        path = Path(name).expanduser()
        if not path.is_file():
            raise LLMInitializationError(f"backend.lora: {name!r} does not exist (from {Path.cwd()})")
    return path, scale


def can_offload(device: DeviceConfig) -> bool:
    """Say whether layers go to a GPU on this device with this build of llama.cpp.

    Raises:
        LLMInitializationError: a GPU is asked for and the build has none.
    """
    supported = bool(llama_cpp.llama_supports_gpu_offload())
    if device.type == "cpu":
        return False
    if device.type in ("cuda", "mps") and not supported:
        flag = "-DGGML_CUDA=on" if device.type == "cuda" else "-DGGML_METAL=on"
        raise LLMInitializationError(
            f"device={device.type}, but llama-cpp-python was built without it; rebuild it, or use device=cpu: "
            f"CMAKE_ARGS='{flag}' pip install --force-reinstall --no-cache-dir llama-cpp-python"
        )
    return supported

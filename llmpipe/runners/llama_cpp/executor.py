"""A GGUF model as the engine of continuous batching sees it."""

from __future__ import annotations

from collections.abc import Sequence

from llmpipe.config import LlamaCppConfig
from llmpipe.runners.batching import Footprint, Sample, Sizes, sizing
from llmpipe.runners.decoding import Utf8Stream
from llmpipe.runners.llama_cpp import devices
from llmpipe.runners.llama_cpp.abort import Abort
from llmpipe.runners.llama_cpp.context import LlamaContext
from llmpipe.runners.llama_cpp.ggml import number_format
from llmpipe.runners.llama_cpp.model import Model
from llmpipe.runners.llama_cpp.sampler import Sampler
from llmpipe.runners.threads import Threads

GPU_SLOTS = 32
"""Rows in flight on a GPU. Not measured; few, as llama.cpp takes the memory of all slots when a context is made."""


class LlamaExecutor:
    """Computes with llama.cpp; see `Executor` in `batching.executor`.

    Args:
        model: The loaded model.
        config: Arithmetic and sizes.
        threads: CPU threads.
        offload: Whether layers may be on a GPU.
        abort: Ends what it computes.
    """

    is_static = False
    never_alone = True
    keeps_nan = True

    def __init__(self, model: Model, config: LlamaCppConfig, threads: Threads, offload: bool, abort: Abort) -> None:
        self._model = model
        self._config = config
        self._threads = threads
        self._offload = offload
        self._abort = abort
        keys, values = model.cache_values_per_token
        of_key, of_value = number_format(config.cache_type_k), number_format(config.cache_type_v)
        per_token = keys * of_key.bytes_per_value + values * of_value.bytes_per_value
        self.footprint = Footprint(
            parameters=model.parameters,
            cache_bytes_per_token=int(per_token),
            gpu_slots=GPU_SLOTS if offload else None,
            mapped_bytes=model.size_bytes if config.mmap and not offload else 0,
            state_bytes=model.state_bytes,
        )

    @property
    def ideal(self) -> Sizes:
        """The sizes that pay; see `sizing.ideal`."""
        return sizing.ideal(self._config, self.footprint)

    def sizes(self, waiting: Sequence[Sample], limit: int, held_tokens: int = 0, is_live: bool = False) -> Sizes:
        """Choose the sizes of a context; see `sizing.choose`."""
        # With some layers here and some there, llama.cpp alone knows how much of the cache goes where.
        all_there = self._offload and self._config.n_gpu_layers in (None, -1)
        free_bytes = devices.gpu_memory()[1] if all_there else None
        return sizing.choose(self._config, self.footprint, waiting, limit, held_tokens, free_bytes, is_live)

    def context(self, sizes: Sizes) -> LlamaContext:
        """Make a context; see `LlamaContext`."""
        return LlamaContext(self._model, self._config, sizes, self._threads, self._offload, self._abort)

    def used_device_bytes(self) -> int:
        """Return the GPUs' memory in use, by whomever."""
        return devices.gpu_memory()[0]

    def sampler(self, sample: Sample) -> Sampler:
        """Return a chain of llama.cpp's samplers."""
        request = sample.request
        return Sampler(request.sampling, request.seed_of(sample.number), self._model, sample.prompt, sample.need)

    def detokenizer(self, sample: Sample) -> Detokenizer:
        """Return what joins the bytes of tokens to text."""
        return Detokenizer(self._model)

    def is_end(self, token: int) -> bool:
        """Say whether `token` ends a generation."""
        return self._model.is_end(token)


class Detokenizer:
    """Tokens → text: every token stands for some bytes, whatever is beside it."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._stream = Utf8Stream()

    def push(self, token: int) -> str:
        """Return the characters that `token` completes."""
        return self._stream.push(self._model.piece(token))
